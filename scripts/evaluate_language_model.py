"""Evaluate a recurrent language model: its perplexity on a text, and a text sampled from it.

    scripts/run python scripts/evaluate_language_model.py --model runs/train_language_model

Evaluation takes a few seconds on two CPU cores. The script prints the scores and a sampled text, and writes
evaluation.json into the folder of the model. The scores should match the test scores in its model card.
"""

from dataclasses import dataclass, field
from typing import Literal

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dl.data.text import TokenStream, encode
from hf_dl.recipes import language_model
from hf_dl.recipes.evaluation import load_model, make_output_folder, use_training_data, write_evaluation
from hf_dl.training.args import parse_flags


@dataclass
class Args(language_model.TextFlags):
    """Flags of this script."""

    model: str = field(default="runs/train_language_model", metadata={"help": "Folder or Hub id of the model."})
    split: Literal["train", "validation", "test"] = field(default="test", metadata={"help": "Split to evaluate on."})
    prompt: str = field(default="", metadata={"help": "Start of the sampled text."})
    max_new_tokens: int = field(default=60, metadata={"help": "Number of tokens to sample. 0 samples no text."})
    temperature: float = field(
        default=1.0, metadata={"help": "Randomness of the text. 0 always takes the most probable token."}
    )
    top_k: int = field(default=0, metadata={"help": "Sample from this number of most probable tokens. 0 for all."})
    top_p: float = field(
        default=1.0, metadata={"help": "Sample from the most probable tokens that have this probability together."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the sampled text."})
    output_dir: str = field(
        default="", metadata={"help": "Folder for the results. Defaults to the folder of the model."}
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Evaluate a language model and write the results.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The scores, with keys such as `test_perplexity`.
    """
    args = parse_flags(Args, argv)
    use_training_data(args, args.model, language_model.TextFlags, argv)
    model = load_model(AutoModelForCausalLM, args.model).eval()
    tokenizer = load_model(AutoTokenizer, args.model)
    folder = make_output_folder(args)

    args.level = "word" if tokenizer.eos_token == "<eos>" else "char"
    data = language_model.load_text(args, args.split)
    stream = TokenStream(
        encode(data, tokenizer), rows=args.eval_rows, length=args.window, first=tokenizer.bos_token_id
    )
    prefix = next(prefix for prefix, split in language_model.SPLITS.items() if split == args.split)
    metrics = {f"{prefix}_{name}": value for name, value in language_model.evaluate(model, stream).items()}
    metrics |= language_model.perplexity_floor(prefix, data, tokenizer)

    write_evaluation(folder, args, metrics)
    if args.max_new_tokens:
        options = {"max_new_tokens": args.max_new_tokens, "seed": args.seed, "temperature": args.temperature}
        options |= {"top_k": args.top_k, "top_p": args.top_p}
        print(language_model.generate(model, tokenizer, args.prompt, **options))
    return metrics


if __name__ == "__main__":
    main()
