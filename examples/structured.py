"""An answer as a pydantic object (`pip install pydantic`). `MODEL = "openai/gpt-oss-20b"` runs the same."""

from pydantic import BaseModel

import mlx_gptoss as gptoss

MODEL = "demo"


class Person(BaseModel):
    """What is to be read out of a sentence."""

    name: str
    age: int
    city: str


with gptoss.load(MODEL) as llm:
    reply = llm.respond("Anna is 31 years old and lives in Rome.", schema=Person, temperature=0.0)
    person = Person.model_validate_json(reply.text)
    print(repr(person))
