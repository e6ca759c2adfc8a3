"""A checkpoint behind the interface of lm-evaluation-harness (0.4.13 or newer; needs neither torch nor transformers).

Tokens are the harness's own: context and continuation are encoded as it does for Hugging Face models whose tokenizer
adds no special tokens, so that an exported model scored by its HFLM gives the same numbers.
"""

from lm_eval.api.model import TemplateLM

from linscale.config import ConfigError
from linscale.evaluation import generation
from linscale.evaluation.scoring import Scorer

GENERATED = 256  # tokens at most, where a task does not say; the harness's own default


class LinscaleLM(TemplateLM):
    """scorer: scoring.Scorer. tokenizer: linscale/data/tokenizers.py.

    separator: put the token that stands before each training document before each context. read: tokens that a prompt
    and its generated text may have together; longer prompts lose their left. None: as many as there are (linear
    models), the scorer's context (softmax models).
    """

    def __init__(self, scorer: Scorer, tokenizer, *, separator: bool = False, read: int | None = None):
        super().__init__()
        self.scorer, self.tokenizer, self.separator = scorer, tokenizer, separator
        limits = [limit for limit in (read, scorer.context) if limit]
        self.read = min(limits) if limits else None

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.separator_id

    @property
    def tokenizer_name(self) -> str:
        return type(self.tokenizer).__name__

    def chat_template(self, chat_template=False):
        return ""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        prefix = [self.eot_token_id] if self.separator and add_special_tokens is not False else []
        return prefix + self.tokenizer.encode(string).tolist()

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # the bar would be that of the tokenizer

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        scores = self.scorer.score([(context, continuation) for _, context, continuation in requests])
        answers = [(score.log_likelihood, score.greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        documents = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        answers = self.scorer.rolling(documents, self.eot_token_id)
        for request, answer in zip(requests, answers):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        out = [""] * len(requests)
        groups: dict = {}
        for n, request in enumerate(requests):
            context, options = request.args
            groups.setdefault(repr(sorted(options.items())), []).append((n, context, options))
        for members in groups.values():
            self._generate_alike(members, out)
        for request, text in zip(requests, out):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return out

    def _generate_alike(self, members, out) -> None:
        """Requests of one kind, longest first, in batches of the scorer's budget."""
        most, sampling, stop = _options(members[0][2])
        if self.read is not None and most >= self.read:
            raise ConfigError(
                f"a task generates up to {most} tokens, but the model reads {self.read} with the prompt included; set "
                "max_gen_toks lower or choose a model of a longer context."
            )
        prompts = []
        for n, context, _ in members:
            ids = self.tok_encode(context)
            prompts.append((n, ids if self.read is None else ids[-(self.read - most) :]))
        prompts.sort(key=lambda prompt: -len(prompt[1]))
        while prompts:
            rows = max(1, self.scorer.budget // (len(prompts[0][1]) + most))
            batch, prompts = prompts[:rows], prompts[rows:]
            texts = generation.generate(
                self.scorer.model,
                self.scorer.params,
                self.tokenizer,
                [ids for _, ids in batch],
                most=most,
                sampling=sampling,
                stop=stop,
                end=self.eot_token_id,
                context=self.read if self.scorer.context else None,
            )
            for (n, _), text in zip(batch, texts):
                out[n] = text


def _options(options: dict) -> tuple[int, generation.Sampling, list[str]]:
    """(tokens at most, sampling, stop strings) of a task's generation_kwargs."""
    stop = options.get("until") or []
    most = options.get("max_gen_toks", options.get("max_new_tokens", GENERATED))
    if not options.get("do_sample", float(options.get("temperature", 0) or 0) > 0):
        return int(most), generation.Sampling(), [stop] if isinstance(stop, str) else list(stop)
    sampling = generation.Sampling(
        float(options.get("temperature", 1.0)), int(options.get("top_k", 0) or 0), float(options.get("top_p", 1.0))
    )
    return int(most), sampling, [stop] if isinstance(stop, str) else list(stop)
