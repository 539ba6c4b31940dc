"""Asks the base model and every adapter the same questions, all of them at once.

    python examples/compare_adapters.py CONFIG "什么是 MoE？" "你好，你是谁？"

CONFIG is a YAML file of ktrt; several adapters are `adapter_name_or_path: a,b` or `adapters`.
Greedy, so that a second run prints the same.
"""

import argparse
from itertools import product

import ktrt


def main() -> None:
    parser = argparse.ArgumentParser(description="The answers of all adapters, side by side.")
    parser.add_argument("config")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    with ktrt.load(args.config, do_sample=False, max_new_tokens=args.max_new_tokens) as session:
        asked = list(product(args.questions, [None, *session.adapters.names]))
        answers = session.batch(
            [
                {"messages": [{"role": "user", "content": question}], "adapter": adapter}
                for question, adapter in asked
            ]
        )
    for (question, adapter), answer in zip(asked, answers, strict=True):
        print(f"{question} [{adapter or 'base'}] {answer.text}")


if __name__ == "__main__":
    main()
