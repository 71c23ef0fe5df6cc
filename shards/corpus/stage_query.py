"""Describe a stage to the ledger. Workers import this module with their stage, so it does not import DuckDB."""

from dataclasses import KW_ONLY, dataclass


@dataclass(frozen=True)
class StageQuery:
    """The SQL by which the ledger finds a stage's pending and current items.

    It may use the temporary tables that earlier stages make.

    Attributes:
        name: also the name of the stage's section of settings.
        after: the stages whose rows `wanted` reads.
        wanted: SELECT item_id, unit, cost, key of the items that ought to exist; `$fingerprint` stands for the stage's.
            The key hashes the fingerprint and the item's inputs: an item whose key has no row is pending.
        table: the stage's table, if one is enough. The rows made with the present keys become `current_TABLE`.
        current: statements that make other `current_…` tables of the rows that `chosen_rows` gives.
        payload: SELECT item_id, key, attempts, cost, … of the rows of `work`: the items that the stage's function gets.
    """

    name: str
    _: KW_ONLY
    after: tuple[str, ...]
    wanted: str
    payload: str
    table: str | None = None
    current: tuple[str, ...] = ()


def chosen_rows(stage: str, table: str) -> str:
    """Return a SELECT of the rows of `table` that count for the items of `stage`.

    A row made with an older key counts, with `up_to_date` false, until a row with the present key replaces it.
    """
    return (
        f"SELECT r.*, c.up_to_date FROM {table} r JOIN chosen_{stage} c ON r.item_id = c.item_id AND r.key = c.key "
        "AND r.fragment = c.fragment"
    )
