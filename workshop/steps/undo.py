"""A command that takes a message back."""

import json
from contextlib import suppress

import chat


async def blank(db, number):
    write, text = db.messages.find_one_and_update, {"$set": {"text": ""}}
    await db.edit("update", write({"_id": number}, text, return_document=True))


class UndoWebSocket(chat.WebSocket):
    async def answer(self, data):
        event = None
        with suppress(ValueError):  # it may be no JSON
            event = json.loads(data)
        match event:
            case {"type": "message", "text": "/undo", "nonce": str(nonce)}:
                history, name = self.room.history, self.user["name"]
                events = history.events.values()
                own = [e["id"] for e in events if e["user"] == name and e["text"]]
                if own:
                    await blank(self.room.db, own[-1])
                return {"type": "receipt", "nonce": nonce, "id": history.last}
        return await super().answer(data)
