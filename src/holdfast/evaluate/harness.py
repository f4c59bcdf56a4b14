"""PrefixSharingLM: lm-eval's tasks over the prefix-sharing engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from torch import nn

from holdfast.errors import UserError
from holdfast.evaluate import text
from holdfast.evaluate.engine import Engine, Score
from holdfast.evaluate.forward import evaluation_mode
from holdfast.evaluate.generate import generate_texts
from holdfast.evaluate.tree import Question

MAX_GEN_TOKENS = 256  # lm-eval's default where a task sets none
GREEDY = {"do_sample", "temperature", "until", "max_gen_toks", "num_beams", "top_p", "top_k"}


@register_model("prefix-sharing")
class PrefixSharingLM(TemplateLM):
    """An lm-eval LM that runs no prefix twice: choices share their context, items their few-shot examples.

    ``pretrained`` is an in-memory causal LM (also inside DDP, or sharded by FSDP2) or a name or folder to load;
    ``batch_size`` bounds the questions of one forward ("auto" or None: only tokens count), ``batch_tokens`` its tokens
    (None: by device). Log-likelihoods, greedy flags and greedy generations are HFLM's; the model's train mode, RNG and
    grad mode are untouched. Requests with sampling or beams go through the model's own ``generate``.
    Under torch.distributed each rank scores the documents lm-eval gives it; `run_tasks` wires that up.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: nn.Module | str,
        tokenizer: Any = None,
        batch_size: int | str | None = "auto",
        *,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        dtype: str = "auto",
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, str):
            pretrained, tokenizer = _load(pretrained, tokenizer, dtype, device)
        if tokenizer is None:
            raise UserError("PrefixSharingLM needs tokenizer= beside an in-memory model.")
        self.tokenizer = tokenizer
        rows = int(batch_size) if batch_size not in (None, "auto") and not str(batch_size).startswith("auto") else None
        self.engine = Engine(pretrained, batch_tokens, max_rows=rows or max_batch_size)
        self.batch_size = batch_size
        self.add_bos_token = add_bos_token
        self._prefix = prefix_token_id
        self.max_length = max_length or text.max_length(self.model, tokenizer)
        self.truncated = 0  # requests that lost tokens on their left
        self._rank, self._world_size = self.engine.forward.rank, self.engine.forward.ranks

    @property
    def model(self) -> Any:
        """The model, out of DistributedDataParallel."""
        return self.engine.forward.model

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self.engine.forward.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: BOS, else EOS."""
        return self._prefix if self._prefix is not None else text.prefix_token(self.tokenizer)

    @property
    def max_gen_toks(self) -> int:
        """Tokens a generation may have where the task does not say."""
        return MAX_GEN_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """Part of lm-eval's request cache key."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of one string."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return text.encode(self.tokenizer, [string], special)[0]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as a prompt, by the tokenizer's own template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, is the greedy continuation) of each (context, continuation)."""
        pairs = [request.args for request in requests]
        encoded = text.encode_pairs(self.tokenizer, pairs, special=self.add_bos_token, prefix=self.prefix_token_id)
        return self._loglikelihood_tokens([(pair, list(c), list(t)) for pair, (c, t) in zip(pairs, encoded)])

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """Requests (pair, context ids, continuation ids), in any order: equal contexts become one question."""
        groups: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)  # an empty continuation has probability 1
        for index, (_, context, continuation) in enumerate(requests):
            if not continuation:
                continue
            kept, cut = text.fit(tuple(context), tuple(continuation), self.max_length)
            self.truncated += cut > 0
            groups.setdefault(kept, {}).setdefault(tuple(continuation), []).append(index)
        asked = [Question(context, tuple(found)) for context, found in groups.items()]
        for found, score in zip(groups.values(), self.engine.score(asked)):
            for k, indices in enumerate(found.values()):
                answer = (score.logprobs[k], score.hits[k] == score.lengths[k])
                for index in indices:
                    answers[index] = answer
        for (pair, _, _), answer in zip(requests, answers):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each whole string, by windows that meet without overlap."""
        strings = [request.args[0] for request in requests]
        asked: list[Question] = []
        owner: list[int] = []
        for index, ids in enumerate(text.encode(self.tokenizer, strings, self.add_bos_token)):
            windows = text.rolling(ids, self.prefix_token_id, self.max_length)
            asked += windows
            owner += [index] * len(windows)
        totals = [0.0] * len(requests)
        scores: Sequence[Score] = self.engine.score(asked)
        for index, score in zip(owner, scores):
            totals[index] += score.logprobs[0]
        for string, total in zip(strings, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until one of its stop strings; greedy requests share prefixes and batches."""
        eos = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        wanted = [dict(normalize_gen_kwargs(request.args[1], self.max_gen_toks)) for request in requests]
        stops = [handle_stop_sequences(list(options.pop("until", None) or []), eos=eos) for options in wanted]
        most = [int(options.pop("max_gen_toks")) for options in wanted]
        greedy = [i for i, options in enumerate(wanted) if _is_greedy(options)]
        made = [""] * len(requests)
        outputs = generate_texts(
            self.engine,
            self.tokenizer,
            [requests[i].args[0] for i in greedy],
            max_new_tokens=[most[i] for i in greedy],
            stop=[stops[i] for i in greedy],
            limit=self.max_length,
            special=self.add_bos_token,
        )
        for i, output in zip(greedy, outputs):
            if output.error:
                raise UserError(output.error)
            self.truncated += output.truncated > 0
            made[i] = output.text
        with evaluation_mode(self.model):
            self.engine.forward.finish()
            for i in sorted(set(range(len(requests))) - set(greedy)):
                made[i] = self._sampled(requests[i].args[0], wanted[i], stops[i], most[i])
        for request, output_text in zip(requests, made):
            self.cache_hook.add_partial("generate_until", request.args, output_text)
        return made

    def _sampled(self, context: str, options: dict[str, Any], stop: list[str], most: int) -> str:
        from holdfast.evaluate.generate import cut

        ids = text.encode(self.tokenizer, [context], self.add_bos_token)[0][-(self.max_length - most) :]
        inputs = torch.tensor([ids], device=self.device)
        made = self.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=most,
            stop_strings=[mark for mark in stop if mark],
            tokenizer=self.tokenizer,
            pad_token_id=self.eot_token_id,
            **{name: value for name, value in options.items() if name != "max_length"},
        )
        return cut(self.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True), stop)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, concatenated."""
        parts = [torch.zeros_like(tensor.reshape(-1)) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, tensor.reshape(-1))
        return torch.cat(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all ranks, on rank ``dst``."""
        parts: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, parts, dst=dst)
        return parts

    def barrier(self) -> None:
        """Wait for all ranks."""
        torch.distributed.barrier()


def _is_greedy(options: dict[str, Any]) -> bool:
    sampled = bool(options.get("do_sample")) or int(options.get("num_beams", 1)) != 1
    return not sampled and set(options) <= GREEDY


def _load(name: str, tokenizer: Any, dtype: str, device: str | None) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    if device:
        model = model.to(device)
    return model, tokenizer or AutoTokenizer.from_pretrained(name)


def run_tasks(
    model: nn.Module, tokenizer: Any, tasks: list[Any], *, lm: dict[str, Any] | None = None, **options: Any
) -> Any:
    """lm_eval.simple_evaluate that is safe inside training: RNG, train mode and grad mode are as before afterwards.

    ``lm`` are options of PrefixSharingLM, the others go to simple_evaluate; bootstrap_iters defaults to 0 (lm-eval's
    100,000 take minutes) and nothing is cached across calls, for lm-eval's cache key does not know the weights.
    """
    import lm_eval

    if options.get("use_cache"):
        raise UserError("use_cache is refused: lm-eval's key does not know the weights, so scores would be stale.")
    with evaluation_mode(model):
        return lm_eval.simple_evaluate(
            model=PrefixSharingLM(model, tokenizer, **(lm or {})),
            tasks=tasks,
            **{"bootstrap_iters": 0, **options},
        )
