"""Show what the cells of a recurrent model of characters do: a text in colors, cells with a meaning, saturated gates.

    scripts/run python scripts/explain_text.py --model runs/train_language_model

The model comes from scripts/train_language_model.py with --level char. The script takes a few seconds. It writes
cells.html, cells.json and one SVG picture per property into the folder of the model, and prints a summary. The
properties are the position in the line, whether a character is inside quotes, and the depth of brackets. The generated
text of --source nested has all of them.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dl.recipes import language_model, text_cells
from hf_dl.recipes.evaluation import load_model, make_output_folder, use_training_data
from hf_dl.training.args import parse_flags


@dataclass
class Args(language_model.TextFlags):
    """Flags of this script."""

    model: str = field(default="runs/train_language_model", metadata={"help": "Folder or Hub id of the model."})
    split: Literal["train", "validation", "test"] = field(default="test", metadata={"help": "Split to read."})
    characters: int = field(default=10_000, metadata={"help": "Number of characters to read, from the start."})
    output_dir: str = field(
        default="", metadata={"help": "Folder for the results. Defaults to the folder of the model."}
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Explain the cells of a language model and write the results.

    Args:
        argv: The flags. Defaults to the command line.

    Returns:
        The content of cells.json.
    """
    args = parse_flags(Args, argv)
    use_training_data(args, args.model, language_model.TextFlags, argv)
    model = load_model(AutoModelForCausalLM, args.model).eval()
    tokenizer = load_model(AutoTokenizer, args.model)
    folder = make_output_folder(args)
    args.level = "char"
    text = text_cells.take_text(list(language_model.load_text(args, args.split)["text"]), args.characters)
    found = text_cells.explain_text(model, tokenizer, text, folder)
    print(text_cells.describe(found))
    return found


if __name__ == "__main__":
    main()
