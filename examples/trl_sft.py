"""SAM and SFA in an existing TRL script: the two lines marked (+) are all that changes.

python examples/trl_sft.py --out runs/example                      # the embedded model and its math task
python examples/trl_sft.py --model MODEL_FOLDER --data train.jsonl --out runs/example
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from holdfast import SAM, SFA, with_methods  # (+)
from holdfast.data import read_examples
from holdfast.lab import load_task, model_dir


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", help="checkpoint folder or hub id; the embedded model if left out")
    options.add_argument("--data", help="a file that read_examples takes; the embedded math task if left out")
    options.add_argument("--out", required=True)
    options.add_argument("--max-steps", type=int, default=100)
    given = options.parse_args()

    source = given.model or str(model_dir())
    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    trainer = with_methods(SFTTrainer)(  # (+) was: SFTTrainer(
        methods=[SAM(rho=0.05), SFA(p=0.25)],  # (+)
        model=model,
        args=SFTConfig(
            output_dir=given.out,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            max_steps=given.max_steps,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            bf16=False,
        ),
        train_dataset=read_examples(given.data) if given.data else load_task("math", "train"),
        processing_class=AutoTokenizer.from_pretrained(source),
    )
    trainer.train()
    trainer.save_model(given.out)


if __name__ == "__main__":
    main()
