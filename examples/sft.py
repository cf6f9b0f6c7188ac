"""TRL's SFTTrainer with a guide: LoRA pairs on a chat model, each with its own learning rate.

    python examples/sft.py --model FOLDER --data chats.jsonl --steps 50

Each line of the data has a "prompt" and a "completion", lists of messages; the loss is on the
completions alone. Prints the pairs with the largest error, and an answer of the merged model.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import rgft
from rgft.integrations.transformers import RGFTCallback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    rows = Dataset.from_json(given.data)
    callback = RGFTCallback(rgft.find_method("rgft-lora").config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(given.model),
            args=SFTConfig(
                folder,
                max_steps=given.steps,
                per_device_train_batch_size=2,
                learning_rate=1e-3,
                max_length=512,
                completion_only_loss=True,
                activation_checkpointing=False,
                use_cpu=not torch.accelerator.is_available(),
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
            callbacks=[callback],  # all that is added
        )
        trainer.train()

    assert callback.guide is not None
    table = callback.guide.error_map.to_pandas()
    last = table[table["step"] == table["step"].max()]
    print(f"\nLoRA pairs after step {callback.guide.step}, the five with the largest error:")
    ranking = last.sort_values("error", ascending=False).head(5)
    print(ranking[["component", "error", "lr_scale"]].to_string(index=False))

    tuned = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model = tuned.merge_and_unload().eval()  # an ordinary model again, without pairs
    asked = tokenizer.apply_chat_template(
        rows[0]["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    answer = model.generate(asked["input_ids"], max_new_tokens=64, do_sample=False)
    print("\nanswer:", tokenizer.decode(answer[0, asked["input_ids"].shape[1] :]))


if __name__ == "__main__":
    main()
