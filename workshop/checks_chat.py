"""The checks of the exercises of part B, on `chat.py`."""
