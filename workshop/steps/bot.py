"""A client that answers."""

import time


async def bot(session):
    after = 0
    while True:
        async with session.ws_connect(f"/ws?after={after}") as ws:
            async for frame in ws:
                event = frame.json()
                if event["type"] == "message":
                    after = event["id"]
                    if event["text"] == "!time":
                        answer = {"type": "message", "nonce": f"answer to {after}"}
                        await ws.send_json(answer | {"text": time.strftime("%H:%M")})
