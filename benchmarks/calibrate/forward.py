"""An ordinary forward in transformers: `python -m benchmarks.calibrate.forward JOB.json`.

It prints, as JSON, the processor seconds of importing and loading, and of the forward.
"""

import json
import sys
import time
from pathlib import Path


def main(file: str) -> None:
    """Load a model as its users do, and run it on the batches."""
    import torch
    from transformers import AutoModelForCausalLM

    job = json.loads(Path(file).read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(job["model"])
    batches = torch.load(job["tokens"])
    loaded = time.process_time()
    run = model if job["head"] else model.model
    with torch.no_grad():
        for ids in batches:
            run(input_ids=ids)
    sys.stdout.write(json.dumps({"start": loaded, "forward": time.process_time() - loaded}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
