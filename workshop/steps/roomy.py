"""A setting that depends on another one."""

from pydantic import field_validator

import chat


class RoomySettings(chat.Settings):
    @field_validator("MAX_UNSENT_BYTES")
    @classmethod
    def holds_a_message(cls, size, info):
        longest = info.data.get("MAX_MESSAGE_LENGTH", 0)  # missing if it is wrong
        if size < 4 * longest:
            raise ValueError(f"must hold the longest message: {4 * longest} bytes")
        return size
