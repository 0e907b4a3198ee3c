"""The engine: one forest of searches, which join and leave between steps."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch

from saffron.errors import ConfigError, EngineClosedError, EngineError, QueueFullError
from saffron.models.checks import expect, expect_limits
from saffron.models.policy import end_tokens
from saffron.models.trie_model import TrieModel
from saffron.search.admission import Admission, give_up
from saffron.search.config import Request, SearchConfig
from saffron.search.eager_step import EagerStep
from saffron.search.handle import Handle, Pending
from saffron.search.job import Job
from saffron.search.method import Decoder
from saffron.search.model_pair import ModelPair
from saffron.search.readers import Row
from saffron.search.statistics import charge, count_step
from saffron.search.step import Batch, Step, StepRecord
from saffron.search.trace import trace_step


class Engine:
    """Runs many searches over one policy and one MRM, a step of all of them at a time.

    `submit` may be called from any thread. Steps are taken by one thread at a time: either the caller's (`step`, or
    `run` until nothing is left), or one of the engine's own between `start` and `close`.

    What a search answers does not depend on what else is in the forest, but for rounding: matrix products of the models
    and sums over the tokens of attention are ordered by the number of rows and tokens of a forward pass, so that scores
    may differ in the last bits, and two candidates that are equal but for those may change places.

    An error that one request causes (outputs that are not finite, a response that outgrows the MRM's context) ends that
    search alone; after any other error every running search ends with an `EngineError`, and the engine goes on. `close`
    it, or use it in a `with` block: one that is dropped ends its searches with an `EngineClosedError`; a thread that
    was started keeps it until it is closed.

    Args:
        models: a policy and an MRM.
        config: of requests that bring none.
        eos_token_id: ids that end a response, for requests that bring none; None: the policy's own.
        queue: requests that may wait; None: any number.
        max_searches: searches and jobs that may run at once; None: any number.
        cache_tokens: slots of either K/V cache that searches may need together; None: as many as a cache that does not
            grow has, or any number. A search waits until what it may need at most is free.
        prefill_tokens: prompt tokens that each model reads between two steps, so that a long prompt does not stop the
            others; None: whole prompts.
        step: how steps are run; None: eagerly.
    """

    def __init__(
        self,
        models: ModelPair,
        config: SearchConfig | None = None,
        *,
        eos_token_id: Iterable[int] | None = None,
        queue: int | None = None,
        max_searches: int | None = None,
        cache_tokens: int | None = None,
        prefill_tokens: int | None = 512,
        step: Step | None = None,
    ) -> None:
        expect("models", models, ModelPair)
        self.policy, self.mrm, self.models = models.policy, models.mrm, models
        self.config = SearchConfig() if config is None else config
        expect("config", self.config, SearchConfig)
        self.eos_token_id = end_tokens(self.policy, eos_token_id)
        expect_limits(queue=queue, max_searches=max_searches, cache_tokens=cache_tokens, prefill_tokens=prefill_tokens)
        self.queue, self.max_searches = queue, max_searches
        self.cache_tokens, self.prefill_tokens = cache_tokens, prefill_tokens
        self._step: Step = step or EagerStep(models)
        # Of the forest: held during a step.
        self._lock = threading.RLock()
        self._stepper: int | None = None  # the thread that takes a step now
        self._room = Admission(models, cache_tokens)
        self._searches = self._room.held  # that prefill or run
        self._batch, self._records, self._stale = Batch(), deque[StepRecord](), False
        # Of the queue.
        self._changed, self._waiting, self._jobs = threading.Condition(), deque[Pending](), list[Job]()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._dropped = weakref.finalize(self, give_up, self._step, self._room, self._waiting, self._jobs)
        self._dropped.atexit = False

    def submit(
        self,
        request: Request,
        config: SearchConfig | None = None,
        *,
        eos_token_id: Iterable[int] | None = None,
        max_width: int | None = None,
        trace: bool = False,
        on_step: Callable[[Handle], None] | None = None,
        index: int | None = None,
    ) -> Handle:
        """Queues a search.

        Args:
            config, eos_token_id: of this search; None: the engine's.
            max_width: the largest `width` that the handle may be set to; None: that of the configuration.
            trace: record every candidate of every step.
            on_step: called by the stepping thread after each step of the search; an error in it ends the search.
            index: its number in a list of requests, for messages.

        Raises:
            ConfigError, PromptTooLongError: a request that cannot be run. CapacityError: one that could need more than
            the cache holds. QueueFullError, EngineClosedError.
        """
        ends = self.eos_token_id if eos_token_id is None else end_tokens(self.policy, eos_token_id)
        settings = self.config if config is None else config
        expect("config", settings, SearchConfig)
        handle = Handle(self, request, settings, ends, trace=trace, max_width=max_width, on_step=on_step)
        self._check(handle, index)
        self._enqueue(handle)
        return handle

    add = submit

    def submit_job(self, method: Decoder[Any], request: Request) -> Job:
        """Queues another method; the engine's thread runs it, a forward pass or two between steps of the searches.

        Raises:
            ConfigError, PromptTooLongError: a request that cannot be run, or caches that do not grow (other methods do
            not say what they need at most). QueueFullError, EngineClosedError.
        """
        for model in (method.policy, *([method.scorer.model] if method.scorer else [])):
            if isinstance(model, TrieModel) and not model.kv.grow:
                raise ConfigError(f"method: got {type(method).__name__}, which needs caches that grow")
        method.check([request])
        job = Job(self, method, request)
        self._enqueue(job)
        return job

    def _enqueue(self, pending: Pending) -> None:
        with self._changed:
            self._check_open()
            if self.queue is not None and len(self._waiting) >= self.queue:
                raise QueueFullError(f"queue: {self.queue} requests are waiting already")
            self._waiting.append(pending)
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed")

    def cancel(self, handle: Pending) -> None:
        """See `Handle.cancel`."""
        handle.cancel()

    def reap(self) -> None:
        """Drops the searches that were cancelled or have ended, unless a step is running: that does it at its end."""
        if self._lock.acquire(blocking=False):
            with self._lock:  # it is reentrant
                self._lock.release()
                if self._stepper is None:
                    self._drop()

    # --- steps: one thread at a time ---

    def step(self, *, linger: bool = False) -> bool:
        """One step of all searches, before which some join and after which some leave. False if there are none.

        Args:
            linger: searches that end in it keep their slots until the next step or `close`.

        Raises:
            EngineError: a callback of a running step calls it.
        """
        self.check_outside("step")
        with self._lock, torch.inference_mode():
            self._stepper = self._room.driver = threading.get_ident()
            try:
                self._drop()
                self._admit()
                went_on = self._run() | self._run_jobs()
            except Exception as error:
                self._end_all(error)
                went_on = True
            except BaseException as error:  # an interrupt is the caller's
                self._end_all(error)
                raise
            finally:
                self._stepper = None
        if not linger:
            self.reap()  # also those cancelled meanwhile
        return went_on

    def run(self, *handles: Handle) -> None:
        """Steps until the handles are done; without any, until there is nothing left to do."""
        while not all(handle.done for handle in handles) if handles else self.busy:
            if not self.step():
                self.wait_for_room()

    def wait_for_room(self) -> None:
        """After a step with nothing to do: others hold the cache that the next search needs. It fails where none but
        this thread could give that back."""
        self._room.wait(self._waiting, self._changed)

    def check_outside(self, what: str) -> None:
        """Raises `EngineError` in the callbacks of a running step, where waiting for the engine would never end."""
        if self._stepper == threading.get_ident():
            raise EngineError(f"{what}: called by a callback (on_step) of a step, which would then wait for itself")

    @property
    def busy(self) -> bool:
        """Whether any search runs or waits."""
        return bool(self._searches or self._waiting or self._jobs)

    @property
    def running(self) -> int:
        """Searches that have been admitted, and other methods."""
        return len(self._searches) + len(self._jobs)

    @property
    def waiting(self) -> int:
        """Searches and other methods in the queue."""
        return len(self._waiting)

    def start(self) -> Engine:
        """Lets a thread of the engine take the steps."""
        with self._changed:
            self._check_open()
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="saffron-engine", daemon=True)
                self._thread.start()
        return self

    def close(self, *, drain: bool = True) -> None:
        """Takes no more requests, and ends: after all of them are answered, or at once (`drain=False`)."""
        self.check_outside("close")
        with self._changed:
            self._closed = True
            if not drain:
                for pending in [*self._waiting, *self._searches, *self._jobs]:
                    pending.cancelled = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self.run()
        with self._lock:
            self._step.close()
        self._dropped.detach()  # others may use the step's buffers now

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(drain=kind is None)

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self.busy)
                if self._closed and not self.busy:
                    return
            if not self.step():
                self.wait_for_room()

    def _check(self, search: Handle, index: int | None) -> None:
        request, config = search.request, search.config
        name, prompt = ("request", "prompt") if index is None else (f"requests[{index}]", f"prompt {index}")
        expect(name, request, Request)
        for model, tokens in ((self.policy, request.policy), (self.mrm, request.reward)):
            model.check_tokens(name, tokens)
            model.check_length(prompt, len(tokens), config.max_new_tokens)
        self._step.check(search)
        self._room.check(search)

    def _admit(self) -> None:
        """Lets those that wait join, in their order, as far as there is room."""
        while self._waiting and (self.max_searches is None or self.running < self.max_searches):
            first = self._waiting[0]
            if isinstance(first, Job):
                self._jobs.append(first)
            elif not (isinstance(first, Handle) and self._step.room > 0 and self._room.admit(first)):
                return
            with self._changed:
                self._waiting.remove(first)
            if isinstance(first, Handle):
                self._step.add(first)

    def _drop(self) -> None:
        with self._changed:
            for pending in [pending for pending in self._waiting if pending.cancelled]:
                self._waiting.remove(pending)
                pending.fail(None)
        self._leave([search for search in self._searches if search.cancelled or search.done], None)

    def _leave(self, searches: Iterable[Handle], error: BaseException | None) -> None:
        """Searches that end now, with an answer if they have one: they give back what they hold."""
        gone = dict.fromkeys(searches)
        if not gone:
            return
        self._stale = True
        try:
            self._step.leave(gone.keys())
        finally:
            for search in gone:
                self._room.give_back(search)
                search.fail(error)

    def _end_all(self, error: BaseException) -> None:
        """After an error that is nobody's own: gives everything back."""
        self._records.clear()
        self._batch, self._stale = Batch(), False
        try:
            self._step.close()
        finally:
            for search in list(self._searches):
                self._room.give_back(search)
                search.fail(error)

    # --- one step ---

    def _run(self) -> bool:
        started = time.perf_counter()
        for search in self._searches:
            search.step_width = search.next_width
        for search, error in self._step.prefill(self.prefill_tokens).items():
            self._leave([search], error)
        if self._stale and not any(row.search in self._searches for row in self._batch.rows):
            self._records.clear()
        if not self._records:
            if self._stale:  # the records of one call count the rows of all searches that there were
                rows, finished = self._batch.rows, self._batch.finished
                self._batch = Batch(*([row for row in x if row.search in self._searches] for x in (rows, finished)))
                self._stale = False
            self._records.extend(self._step.step(self._batch))
        running = self._apply(self._records.popleft()) if self._records else []
        seconds = time.perf_counter() - started
        for search in running:
            search.seconds += seconds / len(running)
            self._report(search)
        for search in running:
            ended = len(search.tree.steps) == search.config.max_new_tokens or not search.tree.live
            if ended and not search.done:
                search.finish(self.policy)
        return bool(running or self._searches)

    def _run_jobs(self) -> bool:
        for job in self._jobs:
            job.advance()
        self._jobs[:] = [job for job in self._jobs if not job.done]
        return bool(self._jobs)

    def _apply(self, record: StepRecord) -> list[Handle]:
        """What one step chose becomes the trees' new beams, and the batch of the next step."""
        rows, finished = self._batch.rows, self._batch.finished
        mine: dict[Handle, list[int]] = {}
        for i, row in enumerate(rows):
            mine.setdefault(row.search, []).append(i)
        children = record.by_search(rows)
        kept = [finished[i] for i in record.kept]
        charge(self.models, rows)
        new, ended = list[Row](), list[Row]()
        for search, indices in mine.items():
            if search in record.failures and search not in record.all_unseen:
                continue  # nothing was chosen for it
            tree, ends = search.tree, search.eos_token_id
            expanded = [rows[i].node for i in indices]
            nodes = [tree.child(rows[c.row].node, *c[1:], c.token in ends) for c in children[search]]
            stay = [node for other, node in kept if other is search]
            if search.config.ranking != "paper":
                stay = [node for node in tree.beam if node.finished]
            live = tree.expand(nodes, stay, search.config.ranking, search.step_width)
            sizes = [record.nucleus_sizes[i] for i in indices]
            count_step(self.models, search, len(expanded), sizes, record.all_unseen[search])
            if tree.trace is not None and record.outputs is not None:
                logits, hidden = (x[indices] for x in record.outputs)
                tree.trace.append(trace_step(self.models, search, expanded, logits, hidden, record.all_unseen[search]))
            if len(tree.steps) == search.config.max_new_tokens:
                live = []
            going_on = set(live)
            new += [Row(search, node) for node in live]
            ended += [Row(search, node) for node in nodes if node not in going_on]
        for search, error in record.failures.items():
            search.fail(error)
        self._batch = Batch(new, [*kept, *ended])
        return [search for search in {**mine, **record.failures} if search in self._searches]

    def _report(self, search: Handle) -> None:
        if search.on_step is not None and search.error is None:
            try:
                search.on_step(search)
            except Exception as error:
                search.fail(error)
        search.notify()
