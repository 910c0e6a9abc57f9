"""Terms of a report, for those who have not read the paper."""

from __future__ import annotations

GLOSSARY = {
    "attention": "How a language model looks back: for every token that it writes, every layer weighs all earlier tokens and "
    "reads from each as much as its weight says.",
    "KV entry, stored token": "What a layer has stored of an earlier token (its key and its value) for attention to read. "
    "Memory traffic for these entries is what makes long contexts slow.",
    "KV head": "Attention of a layer runs in several heads side by side; a KV head has stored entries of its own, which one or "
    "several query heads read.",
    "retrieval group": "A set of entries that is chosen together; a head map says which KV heads read it.",
    "budget": "The number of entries that a KV head may read in one step, everything counted: first tokens (sinks), last tokens "
    "(recent window) and those that were chosen.",
    "tokens read": "Entries that a KV head really read in a step, mean over steps, layers and heads.",
    "selection bytes, selection time": "What choosing had to read, and how long it took, in each step. A method that looks at "
    "everything to choose little has saved nothing.",
    "bytes loaded": "Bytes that were copied from host memory to the device in each step.",
    "overlap": "Share of the chosen tokens that the step before had chosen, too. Only the rest has to be loaded.",
    "attention recall": "Share of the true attention weight that falls on the entries that were read; 100 % is everything.",
    "score": "Share of a task's points that was reached, by the task's own rule; 100 % is best.",
    "score of the suite fidelity": "Share of positions of a text at which the method's likeliest next token is that of full "
    "attention; there are no right answers in it.",
    "95 % interval": "How far chance may have moved a number, with other problems of the same kind, in 95 of 100 such "
    "evaluations. It comes from resampling the problems (bootstrap); intervals of means over tasks combine those of the tasks, "
    "which are independent of each other; every task has the same weight. "
    "Where all problems score the same an interval has no width, though other problems might score otherwise.",
    "keeps … of full attention's score": "The method's score divided by that of full attention. The interval is that of the "
    "paired difference, with full attention's own score taken as it was measured.",
    "paired difference": "Both methods answer the same problems; the difference is taken problem by problem, which takes out how "
    "hard a problem is. An interval that holds zero does not show a difference; it does not show that there is none either.",
    "percentage point": "The difference between 80 % and 81 % is one point.",
    "Pareto front": "The cells that no other cell beats in both accuracy and reading. The oracle and random choice are no "
    "methods to use and do not count.",
    "time to answer": "Seconds from the start of a problem to the end of its answer, in the company of the problems that were "
    "answered beside it, mean over the problems, on the machine named above.",
    "wall time / problem": "Seconds that a batch of problems took, divided by their number.",
}
