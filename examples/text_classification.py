"""Text classification with transformers' Trainer. The lines marked `# +` are all that ardlora_ext adds.

python examples/text_classification.py --model DIR --data FILE.jsonl --out DIR     # columns text and label
"""

import argparse

from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import ardlora_ext as ard  # +

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--max-steps", type=int, default=300)
parser.add_argument("--lr", type=float, default=1e-3)
options = parser.parse_args()

dataset = load_dataset("json", data_files=options.data, split="train").class_encode_column("label")
dataset = dataset.train_test_split(test_size=0.2, seed=0)
tokenizer = AutoTokenizer.from_pretrained(options.model)
dataset = dataset.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True, remove_columns="text")
model = AutoModelForSequenceClassification.from_pretrained(
    options.model, num_labels=dataset["train"].features["label"].num_classes
)

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        options.out, max_steps=options.max_steps, learning_rate=options.lr, report_to="none", logging_steps=20
    ),
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    data_collator=DataCollatorWithPadding(tokenizer),
    callbacks=[ard.RankCallback(ard.ArdConfig(r0=4))],  # +
)
trainer.train()
print(trainer.evaluate())
trainer.save_model()
