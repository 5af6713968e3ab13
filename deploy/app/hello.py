"""The app that docker-compose.yml serves: the example of the README, without a main."""

import asyncio

import streamflow as sf

app = sf.App("hello")


@app.step(retry=sf.Retry(max_attempts=5, initial=0.1))
async def greet(name: str) -> str:
    return f"Hello, {name}"


@app.workflow
async def welcome(names: list[str]) -> list[str]:
    greetings = await asyncio.gather(*(greet(name) for name in names))
    await asyncio.sleep(1)
    return list(greetings)
