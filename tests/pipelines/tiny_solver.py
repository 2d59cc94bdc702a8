"""A model of some words that has learned two problems by heart, for the tests of pipeline, scripts and page."""

import torch

from hf_dl import programs
from hf_dl.data.math_programs import NUMBER_TOKENS, problem_tokenizer, program_tokenizer
from hf_dl.models import ProgramSeq2SeqConfig, ProgramSeq2SeqForConditionalGeneration
from hf_dl.pipelines.math_program import MathProgramPipeline

TRAIN = "a train runs 120 km in 2 hours . how far does it run in 5 hours ?"
PENS = "3 pens cost 12 rs . what do 7 pens cost ?"
LEARNED = {TRAIN: "divide(n0,n1)|multiply(#0,n2)", PENS: "divide(n1,n0)|multiply(#0,n2)"}


def make_solver(*, steps=120, **fields):
    """A pipeline whose model was trained for some steps on `LEARNED`."""
    torch.manual_seed(0)
    texts = [programs.mask_numbers(problem)[0] for problem in LEARNED]
    words, symbols = problem_tokenizer(texts, min_count=1), program_tokenizer()
    config = ProgramSeq2SeqConfig(
        **{
            "encoder_vocab_size": len(words),
            "program_tokens": symbols.convert_ids_to_tokens(list(range(len(symbols)))),
            "operations": dict(programs.OPERATIONS),
            "number_token_ids": words.convert_tokens_to_ids(list(NUMBER_TOKENS)),
            "embedding_size": 16,
            "encoder_hidden_size": 16,
            "program_embedding_size": 16,
            "decoder_hidden_size": 32,
            "attention_size": 16,
            "dropout": 0.0,
            "max_program_length": 16,
            "pad_token_id": symbols.pad_token_id,
            "bos_token_id": symbols.bos_token_id,
            "eos_token_id": symbols.eos_token_id,
            "decoder_start_token_id": symbols.bos_token_id,
            **fields,
        }
    )
    pipeline = MathProgramPipeline(ProgramSeq2SeqForConditionalGeneration(config), words)
    batch = pipeline.pad(pipeline.encode(texts)["input_ids"])
    labels = torch.tensor(symbols(list(LEARNED.values()))["input_ids"])
    optimizer = torch.optim.Adam(pipeline.model.parameters(), 2e-2)
    pipeline.model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        pipeline.model(**batch, labels=labels, teacher_forcing_ratio=1.0).loss.backward()
        optimizer.step()
    pipeline.model.eval()
    return pipeline
