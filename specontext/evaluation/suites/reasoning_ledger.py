"""A ledger: transfers between accounts, whose balances the model has to carry along."""

from __future__ import annotations

import random
from dataclasses import dataclass

from specontext.evaluation.suites.reasoning_steps import Puzzle, StepsTask

STEPS_PER_ACCOUNT = 4
LARGEST = 99


@dataclass(frozen=True)
class LedgerTask(StepsTask):
    """Transfers between accounts; each step looks up a transfer and the two balances last written, far back.

    An account takes part in some eight transfers, so that a balance is needed long after it was written.
    """

    def puzzle(self, steps: int, rng: random.Random) -> Puzzle:
        accounts = [f"A{number}" for number in range(1, max(2, steps // STEPS_PER_ACCOUNT) + 1)]
        balances = {account: rng.randint(LARGEST, 9 * LARGEST) for account in accounts}
        opening = "\n".join(f"{account}: {balance}" for account, balance in balances.items())
        transfers, worked, results = [], [], []
        for i in range(1, steps + 1):
            payer, payee = rng.sample(accounts, 2)
            if not balances[payer]:
                payer, payee = payee, payer
            if not balances[payer]:
                payer = max(accounts, key=lambda account: balances[account])
            amount = rng.randint(1, min(LARGEST, balances[payer]))
            balances[payer] -= amount
            balances[payee] += amount
            transfers.append(f"{i}. {payer} pays {amount} to {payee}")
            worked.append(f"{payer} = {balances[payer]}, {payee} = {balances[payee]}")
            results.append((payer, str(balances[payer]), payee, str(balances[payee])))
        asked = rng.choice(accounts)
        listed = "\n".join(transfers)
        message = (
            f"These are the balances of some accounts.\n\n{opening}\n\nThese transfers are made in order.\n\n{listed}\n\n"
            "For each transfer write the new balances of payer and payee on one line, exactly in this form:\n"
            f"Step 1: A7 = 120, A2 = 333\nAt the end write the balance of {asked} as\nFinal: 120\nWrite nothing else."
        )
        return Puzzle(message, tuple(worked), tuple(results), str(balances[asked]))
