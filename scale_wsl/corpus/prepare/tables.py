"""The table of rejects: every post that could not be read or whose image could not be used, by name and with a reason.

Posts that were left out because of their hashtags are not among them; they are counted in the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scale_wsl.corpus.prepare.scan import rejects_schema
from scale_wsl.corpus.prepare.work import Chunk, Work
from scale_wsl.files import published_file

__all__ = ["write_rejects"]


def write_rejects(work: Work, chunks: Sequence[Chunk], splits: int, path: Path) -> None:
    """Write all rejects of a preparation, in the order of the posts, as Parquet: key, reason, detail."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with published_file(path) as aside, pq.ParquetWriter(aside, rejects_schema(), compression="zstd") as writer:
        for split in range(splits):
            for table in pq.ParquetFile(work.scanned(split) / "rejects.parquet").iter_batches():
                writer.write_table(pa.table(table))
        for chunk in chunks:
            seen = work.seen(chunk, ["reason", "detail"])
            refused = seen.column("reason").is_valid()
            if refused.to_numpy().any():
                key = work.posts(chunk, ["key"]).column("key")
                columns = [key.filter(refused), *(seen.column(name).filter(refused) for name in ("reason", "detail"))]
                writer.write_table(pa.table([column.combine_chunks() for column in columns], schema=rejects_schema()))
