"""Variable tracking over several hops, in RULER's form: the answer lists the chain of variables."""

from __future__ import annotations

import random
from dataclasses import dataclass

from specontext.tasks.problem import Problem, TokenCounter, assemble
from specontext.tasks.words import NOUNS

HEADER = "Follow the variables in this text."


@dataclass(frozen=True)
class TrackingTask:
    """Chains ` VAR a = 417.`, ` VAR b = a.`, ` VAR c = b.` hidden in filler; the question names a value.

    Attributes:
        name: task name.
        chains: number of chains in the text, a range; one of them is asked for.
        hops: assignments from variable to variable in each chain, a range.
        questions: number of questions, a range; all but the last are given with their answers.
        filler: probability that the text has filler at all.
    """

    name: str
    chains: tuple[int, int]
    hops: tuple[int, int]
    questions: tuple[int, int] = (1, 1)
    filler: float = 1.0

    def sample(self, length: int, rng: random.Random, count_tokens: TokenCounter) -> Problem:
        """Draw one problem whose prompt and answer take at most `length` tokens.

        Raises:
            LengthError: the task needs more tokens than that.
        """
        hops = rng.randint(*self.hops)
        chain_count = rng.randint(*self.chains)
        names = rng.sample(NOUNS, chain_count * (hops + 1))
        values = rng.sample(range(100, 1000), chain_count)
        chains = [names[i * (hops + 1) : (i + 1) * (hops + 1)] for i in range(chain_count)]
        turns = [i for i in range(chain_count) for _ in range(hops + 1)]
        rng.shuffle(turns)
        done = [0] * chain_count
        facts = []
        for i in turns:
            source = str(values[i]) if done[i] == 0 else chains[i][done[i] - 1]
            facts.append(f" VAR {chains[i][done[i]]} = {source}.")
            done[i] += 1
        dialogue = [
            (f"\nQuestion: which variables have the value {value}?\nAnswer:", f" {' '.join(chain)}.")
            for value, chain in zip(values, chains, strict=True)
        ]
        count = min(rng.randint(*self.questions), chain_count)
        return assemble(self.name, HEADER, facts, dialogue[:count], length, rng, count_tokens, self.filler)


VARIABLE_TRACKING = TrackingTask("variable_tracking", chains=(2, 4), hops=(2, 4))
