"""A login that tells nothing."""

import chat


class CarefulLogin(chat.Login):
    async def submit(self, form):
        await self.count_attempt(form["login"])
        user = await chat.User(self.request[chat.DB]).find(form["login"])
        password = form["password"]
        if not user:
            right = await self.in_hash_thread(chat.hash_password, password) and False
        else:
            both = password, user["password"]
            right = await self.in_hash_thread(chat.verify_password, *both)
        if not right:
            raise chat.FormError({"login": "No account has this name and password."})
        return user
