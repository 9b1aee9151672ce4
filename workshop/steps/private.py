"""Messages for one person."""

import chat


class PrivateWebSocket(chat.WebSocket):
    async def answer(self, user, event):
        room, text = self.request.app[chat.ROOM], str(event.get("text"))
        wrong = chat.validate_event(event, room.settings.MAX_MESSAGE_LENGTH)
        if wrong or not text.startswith("/msg "):
            return await super().answer(user, event)
        _, name, text = f"{text}  ".split(" ", 2)
        both = [c for c in room.connections if c.user["name"] in (name, user["name"])]
        if name not in [connection.user["name"] for connection in both]:
            error = chat.error_event("bad_event", event)
            return error | {"text": f"{name} is not here."}
        private = {"type": "private", "user": user["name"], "to": name}
        for connection in both:
            room.send(connection, private | {"text": text.strip()})
        last = room.history.last_broadcast
        return {"type": "receipt", "nonce": event["nonce"], "id": last}
