"""The paper's models and layouts as megalina configurations (USENIX ATC 2023, section 7.1 and Table 1).

The paper gives layers, experts and parameters.  512 wide with experts of 2,048 is the only usual shape that gives all six sizes
of Table 1.  Everything else here is assumed, and says so.
"""

from dataclasses import dataclass, replace

from megalina.config import PretrainConfig
from megalina.step.plan import Plan

SEQ_LEN, SEQUENCES = 512, 8  # of a GPU's batch; assumed: with the rate of a link they are one constant, see `walk.Constants`
MB = 10**6
PARTITION_BYTES = 30 * MB  # section 7.1


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    layers: int
    d_model: int
    num_heads: int
    vocab_size: int  # assumed
    packing: int  # experts a GPU that the paper's controller chose (Table 3)
    packing_16: int  # with 16 experts

    def packed(self, experts: int) -> int:
        return self.packing_16 if experts == 16 else self.packing


def txl(layers: int) -> Model:
    """Transformer-XL.  Its relative positions, a fifth matrix of attention, have no equivalent: positions are learned.  Its words
    are characters (Enwik8), so there is no embedding to speak of."""
    return Model(f"TXL-{layers}", layers, 512, 8, 256, 2, 4)


TXL = txl(24)
# 12 layers of encoder and 12 of decoder, all as decoder layers without cross-attention; BERT's words.
BERT2GPT2 = Model("BERT2GPT2", 24, 512, 8, 30522, 2, 2)
# GPT-2's width is 768.  With it the model has 1.13 times TXL's weights; in Table 4 it takes 1.16 times the memory.
GPT2 = Model("GPT-2", 12, 768, 12, 50257, 2, 2)
TRAINED = (TXL, BERT2GPT2, GPT2)

DDP = Plan("ddp", merge_bytes=25 * 2**20)
PRIORITY = Plan("priority", yields=True)
PARTITION = Plan("priority_partition", yields=True, piece_bytes=PARTITION_BYTES)
PIPELINE = replace(PARTITION, strategy="lina_nopack", chunks=(2,))
FIXED = Plan("fixed")
SERIAL = Plan("serial")


def lina(model: Model, experts: int) -> Plan:
    """All of it, packed as in the paper."""
    return replace(PIPELINE, strategy="lina", packing=model.packed(experts))


def config_of(base: PretrainConfig, model: Model, experts: int, *, top_k: int = 2, sequences: int = SEQUENCES) -> PretrainConfig:
    """`base`: on conf/cluster/lina_testbed.yaml, with one of the models conf/model/lina_*.yaml.  One expert a GPU."""
    ranks_per_node = base.cluster.ranks_per_node
    return replace(
        base,
        model=replace(
            base.model,
            name=model.name,
            num_layers=model.layers,
            d_model=model.d_model,
            num_heads=model.num_heads,
            num_kv_heads=model.num_heads,
            num_experts=experts,
            d_ff=4 * model.d_model,
        ),
        router=replace(base.router, top_k=top_k),
        parallel=replace(base.parallel, ep=experts),
        train=replace(
            base.train, seq_len=SEQ_LEN, micro_batch_size=sequences, global_batch_size=sequences * experts, dtype="float32"
        ),
        cluster=replace(base.cluster, nodes=-(-experts // ranks_per_node)),
    )
