"""A query of one's own."""

import re

import chat


async def search(db, text, count=20):
    query = {"text": {"$regex": re.escape(text), "$options": "i"}}
    found = db.messages.find(query).sort("_id", -1).limit(count)
    return await chat.with_deadline(found.to_list(None))
