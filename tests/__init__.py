"""Tests of what needs browsers, a proxy or several processes."""

import pytest

# A failed assertion in a helper shows its values, as one in a test does.
pytest.register_assert_rewrite("tests.parts")
