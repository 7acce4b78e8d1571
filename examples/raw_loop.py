"""Text classification in a plain PyTorch loop. The lines marked `# +` are all that ardlora_ext adds.

python examples/raw_loop.py --model DIR --data FILE.jsonl --out DIR     # columns text and label
"""

import argparse
import json

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_scheduler

import ardlora_ext as ard  # +

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--max-steps", type=int, default=300)
parser.add_argument("--lr", type=float, default=1e-3)
options = parser.parse_args()

torch.manual_seed(0)
with open(options.data, encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
names = sorted({row["label"] for row in rows})
tokenizer = AutoTokenizer.from_pretrained(options.model)


def collate(batch: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    inputs = tokenizer([row["text"] for row in batch], padding=True, truncation=True, return_tensors="pt")
    return {**inputs, "labels": torch.tensor([names.index(row["label"]) for row in batch])}


loader = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collate)
model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(names))
ard.attach(ard.wrap(model, ard.ArdConfig(r0=4, total_steps=options.max_steps)))  # +
optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=options.max_steps)

model.train()
step = 0
while step < options.max_steps:
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step += 1
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
        if step == options.max_steps:
            break
model.save_pretrained(options.out)
