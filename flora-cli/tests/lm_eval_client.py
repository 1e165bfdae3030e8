"""Has lm-eval score the golden task through a server, by each of its models: lm_eval_client.py URL TASKS MODEL...

The working folder has the task's `items.jsonl`. The last line is JSON: by model, of each item's answers the log-likelihood and whether
the answer is the greedy text.
"""

import json
import sys

import lm_eval
from lm_eval.tasks import TaskManager


def main():
    url, tasks, *models = sys.argv[1:]
    manager = TaskManager(include_path=tasks, include_defaults=False)
    found = {}
    for model in models:
        results = lm_eval.simple_evaluate(
            model="local-completions",
            # No tokenizer: it is the server's.
            model_args={"model": model, "base_url": f"{url}/v1/completions", "num_concurrent": 8, "max_retries": 1},
            tasks=["golden"],
            task_manager=manager,
            bootstrap_iters=0,
        )
        samples = sorted(results["samples"]["golden"], key=lambda sample: sample["doc_id"])
        found[model] = [sample["filtered_resps"] for sample in samples]
    print(json.dumps(found))


main()
