def me(name, event):
    if event["text"].startswith("/me "):
        return event | {"text": f"* {name} {event['text'][4:]}"}
    return event
