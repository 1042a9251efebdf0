"""lm-eval on a tiny data set of its own: a log-likelihood task and a generation task. Prints one JSON object.

Each item's log-likelihood is printed with its tokens, to be compared with the model's logits.
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": os.environ["API_KEY"]}

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

URL = os.environ["BASE_URL"]
PEOPLE = [("Anna", "Rome"), ("Ben", "Oslo"), ("Cleo", "Paris"), ("Dan", "Lima")]
CITIES = [city for _, city in PEOPLE]


def tasks(data: str) -> list[dict[str, Any]]:
    """The two tasks."""
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": data}}, "test_split": "test"}
    choice = {
        "task": "lives_in",
        "output_type": "multiple_choice",
        "doc_to_text": "{{name}} lives in",
        "doc_to_choice": CITIES,
        "doc_to_target": "{{cities.index(city)}}",
        "metric_list": [{"metric": "acc"}],
    }
    generation = {
        "task": "says_where",
        "output_type": "generate_until",
        "doc_to_text": "{{name}} lives in {{city}}. {{name}} lives in",
        "doc_to_target": "{{city}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    }
    return [source | choice, source | generation]


with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
    data = Path(folder) / "people.jsonl"
    rows = [{"name": name, "city": city, "cities": CITIES} for name, city in PEOPLE]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = {"model": "any", "base_url": f"{URL}/v1/completions", "auth_token": os.environ["API_KEY"]}
    model = get_model("local-completions").create_from_arg_obj(arguments, {"batch_size": 4})
    found = lm_eval.simple_evaluate(model=model, tasks=tasks(str(data)), bootstrap_iters=0)
    pairs = [(f"{name} lives in", f" {city}") for name, _ in PEOPLE for city in CITIES]
    requests = [
        Instance("loglikelihood", doc={}, arguments=pair, idx=index) for index, pair in enumerate(pairs)
    ]
    scores = model.loglikelihood(requests)

results = found["results"]
print(
    json.dumps(
        {
            "backend": model.tokenizer_backend,
            "accuracy": results["lives_in"]["acc,none"],
            "exact": results["says_where"]["exact_match,none"],
            "items": [
                {"context": context, "continuation": continuation, "score": score, "greedy": greedy}
                for (context, continuation), (score, greedy) in zip(pairs, scores, strict=True)
            ],
        }
    )
)
