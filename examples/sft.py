"""Supervised fine-tuning with TRL. The lines marked `# +` are all that ardlora_ext adds.

python examples/sft.py --model DIR --data FILE.jsonl --out DIR     # a column text
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import ardlora_ext as ard  # +

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--max-steps", type=int, default=300)
parser.add_argument("--lr", type=float, default=1e-3)
options = parser.parse_args()

trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(options.model),
    args=SFTConfig(
        options.out,
        max_steps=options.max_steps,
        learning_rate=options.lr,
        max_length=256,
        report_to="none",
        logging_steps=20,
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=load_dataset("json", data_files=options.data, split="train").select_columns("text"),
    processing_class=AutoTokenizer.from_pretrained(options.model),
    callbacks=[ard.RankCallback(ard.ArdConfig(r0=4))],  # +
)
trainer.train()
trainer.save_model()
