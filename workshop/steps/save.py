"""Two writers on one database."""

from pymongo.errors import DuplicateKeyError


async def save(messages, number, message):
    while True:
        try:
            await messages.insert_one({"_id": number} | message)
            return number
        except DuplicateKeyError:
            own = {name: message[name] for name in ("user_id", "nonce")}
            if stored := await messages.find_one(own):
                return stored["_id"]
            newest = await messages.find_one({}, sort=[("_id", -1)])
            number = newest["_id"] + 1
