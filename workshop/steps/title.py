"""A setting of one's own."""

from pydantic import Field

import chat


class MySettings(chat.Settings):
    TITLE: str = Field("Chat", min_length=1, max_length=30)
