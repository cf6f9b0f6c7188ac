"""The Hugging Face Trainer with a guide: one callback.

    python examples/trainer.py --steps 40

Trains the half of the components with the largest error, freezes the rest, and prints what share
of the FLOPs of full fine-tuning that took.
"""

from __future__ import annotations

import argparse
import tempfile

from transformers import Trainer, TrainingArguments, set_seed

import rgft
from rgft.batches import Collator, tokenize
from rgft.integrations.transformers import RGFTCallback
from rgft.models import load_classifier, load_tokenizer
from rgft.tasks import load_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()

    set_seed(0)
    task = load_task("reviews")
    tokenizer = load_tokenizer("minilm")
    model = load_classifier("minilm", task.label_names, tokenizer.pad_token_id)
    examples = tokenize(task, "train", tokenizer, max_length=32)

    config = rgft.Config(policy="top", top=0.5, every=10, warmup=10)
    callback = RGFTCallback(config)
    meter = rgft.FlopMeter(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=given.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            logging_steps=20,
            disable_tqdm=True,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=examples,
            data_collator=Collator(tokenizer),
            callbacks=[callback],  # all that is added
        )
        trainer.train()
    meter.close()

    assert callback.guide is not None
    print(f"\nthe plan after {callback.guide.step} steps:")
    print(callback.guide.plan)
    print(f"\nFLOPs: {meter.share:.1%} of full fine-tuning on the same batches")


if __name__ == "__main__":
    main()
