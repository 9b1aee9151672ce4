"""A login that tells nothing."""

import chat


class CarefulLogin(chat.Login):
    async def submit(self, form):
        await self.count_attempt(form["login"])
        user = await chat.find_user(self.request[chat.DB], form["login"])
        both = form["password"], user["password"] if user else chat.NO_PASSWORD
        right = await self.in_hash_thread(chat.verify_password, *both)
        if not right or not user:
            raise chat.FormError({"login": "No account has this name and password."})
        return user
