"""Every key of a run, declared once: its default, its meaning, its unit.

Other configs start from this one and change what differs. On the command line:
--config=configs/NAME.py --config.optim.learning_rate=3e-4
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # of the initialisation, the order of the data and dropout
    c.steps = 1000  # updates
    c.batch_size = 16  # examples of a global batch
    c.block_size = 256  # tokens of an example
    c.accumulation = 1  # microbatches that a batch is cut into, one after another
    c.dtype = "float32"  # of the computation: float32 or bfloat16
    c.attention = "auto"  # or xla, cudnn (NVIDIA, bfloat16), pallas (TPU)
    c.remat = "none"  # for less memory compute again: none, dots (all but matrix
    # products), block (all of a layer)
    c.log_every = 10  # steps between records of the training metrics

    m = c.model = ConfigDict()  # as in GPT2Config
    m.vocab_size = 0  # 0: the tokenizer's; more pads the vocabulary
    m.n_positions = 256
    m.n_embd = 256
    m.n_layer = 4
    m.n_head = 4
    m.n_inner = config_dict.placeholder(int)  # MLP width; None: 4 * n_embd
    m.bias = True  # in linears and LayerNorms
    m.activation_function = "gelu_new"  # GPT-2's; nanoGPT's is gelu
    m.scale_attn_weights = True  # scores times 1 / sqrt(head_dim)
    m.scale_attn_by_inverse_layer_idx = False  # and times 1 / (layer + 1)
    m.layer_norm_epsilon = 1e-5
    m.initializer_range = 0.02
    m.embd_pdrop = 0.0
    m.attn_pdrop = 0.0
    m.resid_pdrop = 0.0

    d = c.data = ConfigDict()
    d.path = ""  # text file, folder of them, or prepared folder; "": built-in corpus
    d.tokenizer = "sentencepiece"  # sentencepiece, char, bytes, or path of a given one
    d.vocab_size = 4096  # of a tokenizer to train; 0: what the tokenizer has
    d.splits = (0.9, 0.05, 0.05)  # of the text: train, validation, test

    o = c.optim = ConfigDict()
    o.learning_rate = 1e-3  # peak
    o.min_learning_rate = 1e-4  # at the last step
    o.warmup_steps = 100
    o.b1 = 0.9
    o.b2 = 0.95
    o.eps = 1e-8
    o.weight_decay = 0.1  # on tensors with ndim >= 2
    o.clip_norm = 1.0  # of the global gradient

    s = c.mesh = ConfigDict()  # devices along each axis; one of them -1: the rest
    s.data = -1
    s.fsdp = 1
    s.tensor = 1

    e = c.eval = ConfigDict()
    e.every = 100  # steps
    e.batches = 20  # microbatches from the start of the validation split; 0: all
    e.sample_tokens = 0  # tokens to generate at each evaluation; 0: none
    e.sample_prompt = ""

    k = c.checkpoint = ConfigDict()
    k.every = 100  # steps
    k.keep_last = 2  # and the one with the best validation loss

    return c.lock()
