"""Judging checkpoints: likelihoods, the standard harness, needles, recall, generation.

runs.py        a run directory opened for reading: config, tokenizer, parameters of any checkpoint
scoring.py     log-likelihoods of continuations and of whole documents
generation.py  decoding: greedy or sampled, batched, constant memory for linear models;  generate_command.py  its command
adapter.py     both behind the interface of lm-evaluation-harness
tasks.py       the paper's nine tasks from local files;  scrolls.py  the SCROLLS suite
needle.py      needle in a haystack, scored in needle_scores.py as the paper does
recall.py      multi-query associative recall;  positions.py  loss by position
table.py       results of a ladder in the layout of the paper's Table 4
"""
