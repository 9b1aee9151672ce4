"""A command that takes a message back."""

import json
from contextlib import suppress

import chat


class UndoWebSocket(chat.WebSocket):
    async def answer(self, data):
        event = None
        with suppress(ValueError):  # it may be no JSON
            event = json.loads(data)
        match event:
            case {"type": "message", "text": "/undo", "nonce": str(nonce)}:
                history, db, name = self.room.history, self.room.db, self.user["name"]
                events = history.events.values()
                own = [e["id"] for e in events if e["user"] == name and e["text"]]
                if own:
                    blank = {"$set": {"text": ""}}
                    await db.edit(db.messages.update_one({"_id": own[-1]}, blank))
                return {"type": "receipt", "nonce": nonce, "id": history.last}
        return await super().answer(data)
