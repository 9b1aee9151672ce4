"""A command that takes a message back."""

import chat


class UndoWebSocket(chat.WebSocket):
    async def answer(self, data):
        match chat.parse(data):
            case {"type": "message", "text": "/undo", "nonce": str(nonce)}:
                history, name = self.room.history, self.user["name"]
                events = history.events.values()
                own = [e["id"] for e in events if e["user"] == name and e["text"]]
                if own:
                    await self.room.db.edit("messages", own[-1], {"$set": {"text": ""}})
                return {"type": "receipt", "nonce": nonce, "id": history.last}
        return await super().answer(data)
