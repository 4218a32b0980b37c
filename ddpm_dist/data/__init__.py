"""The data plane: a folder of WebDataset shards to an exact, resumable, elastic stream of batches, and back.

Order is a pure function of integers. The room never hears of networks or processes, never drops a sample without
counting it, and never deletes what it didn't write.
"""

from typing import TYPE_CHECKING

from ddpm_dist.lazy import lazily

if TYPE_CHECKING:
    from ddpm_dist.data.decode import Pixels as Pixels, encode_png as encode_png, encode_raw as encode_raw
    from ddpm_dist.data.foreign import index_shards as index_shards
    from ddpm_dist.data.index import (
        DataIndex as DataIndex,
        ShardInfo as ShardInfo,
        content_hash as content_hash,
        load_index as load_index,
        table_name as table_name,
    )
    from ddpm_dist.data.loader import Batch as Batch, Loader as Loader
    from ddpm_dist.data.order import share_of as share_of
    from ddpm_dist.data.reading import Reading as Reading
    from ddpm_dist.data.sources import SOURCES as SOURCES, SourceOptions as SourceOptions
    from ddpm_dist.data.stream import DecodedSample as DecodedSample, iterate as iterate
    from ddpm_dist.data.verify import verify_shards as verify_shards
    from ddpm_dist.data.view import BatchView as BatchView
    from ddpm_dist.data.writer import (
        EncodedSample as EncodedSample,
        ShardSummary as ShardSummary,
        WrittenShard as WrittenShard,
        write_index as write_index,
        write_shard as write_shard,
    )

__all__, _asked = lazily(
    __name__,
    modules="build",
    index="DataIndex ShardInfo content_hash load_index table_name",
    loader="Batch Loader",
    order="share_of",
    stream="DecodedSample iterate",
    decode="Pixels encode_png encode_raw",
    writer="EncodedSample ShardSummary WrittenShard write_index write_shard",
    view="BatchView",
    foreign="index_shards",
    verify="verify_shards",
    reading="Reading",
    sources="SOURCES SourceOptions",
)
if not TYPE_CHECKING:
    __getattr__, __dir__ = _asked
