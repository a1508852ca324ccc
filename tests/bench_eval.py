"""Speed of log-likelihood scoring, in tokens/s; prints a line of JSON for each task.

python tests/bench_eval.py SmolLM2 ../shared/data [items=48] [rounds=3] [dtype=auto]

`forward` and `hidden` are the model with and without its head on full batches of as many tokens;
`scored` counts the tokens that scoring feeds, `shared` and `scratch` those of all requests, context
and all, when a context is encoded once and when it is encoded for every choice. The sides take turns;
each figure is the best of the rounds. On a CPU the seconds are CPU seconds of one thread, so that
other work on the machine does not count. `scored / forward` should reach 0.6, and on mc1
`shared / scratch` 2.5.
"""

import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import eval as E
from data import Tokenizer
from model import Transformer


@torch.no_grad()
def bench(path, data, items=48, rounds=3, dtype="auto", micro_tokens=4096):
    device, dtype = E.pick("auto", dtype)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    torch.set_num_threads(1)
    model = Transformer.from_pretrained(path, dtype, device).eval()
    tokenizer = Tokenizer.from_pretrained(path)
    for task, file in (("truthfulqa_mc1", "truthfulqa/mc_task.json"), ("boolq", "boolq/val.jsonl")):
        whole = list(E.TASKS[task][1](Path(data, file)))[:items]
        # each choice on its own, and no two of an item in succession, for these would share a row
        single = [
            (k, w | {"continuations": [c]}) for w in whole for k, c in enumerate(w["continuations"])
        ]
        single = [one for _, one in sorted(single, key=lambda pair: pair[0])]

        def ids(text):
            return len(E.default_ids(tokenizer, text))

        requests = sum(ids(one["context"] + one["continuations"][0]) - 1 for one in single)
        fed = sum(ids(one["context"]) for one in whole)  # and the continuations but for their last
        fed += requests - sum(ids(one["context"]) for one in single)
        batch = torch.randint(0, tokenizer.vocab_size, (micro_tokens // 256, 256), device=device)

        def passes(function):
            for _ in range(-(-fed // batch.numel())):
                function(batch)
            return -(-fed // batch.numel()) * batch.numel()

        sides = {
            "forward": lambda: passes(model),
            "hidden": lambda: passes(model.hidden),
            "shared": lambda: E.loglikelihoods(model, tokenizer, whole, micro_tokens) and requests,
            "scratch": lambda: (
                E.loglikelihoods(model, tokenizer, single, micro_tokens) and requests
            ),
        }
        rates = defaultdict(list)
        for _ in range(rounds):
            for name, side in sides.items():
                start = clock()
                tokens = side()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                rates[name].append(tokens / (clock() - start))
        best = {name: max(values) for name, values in rates.items()}
        best["scored"] = best["shared"] * fed / requests
        result = {"task": task, "items": len(whole), "requests": requests, "fed": fed}
        result |= {name: round(rate) for name, rate in best.items()}
        result |= {"dtype": str(dtype), "scored / forward": best["scored"] / best["forward"]}
        result |= {"scored / hidden": best["scored"] / best["hidden"]}
        print(
            json.dumps(result | {"shared / scratch": best["shared"] / best["scratch"]}), flush=True
        )


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    path, data, *more = sys.argv[1:]
    bench(path, data, *map(int, more[:2]), *more[2:])
