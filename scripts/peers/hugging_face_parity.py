"""Run Hugging Face's BertModel for parity_peers.py, in an environment of its own: hugging_face_parity.py '{"out": ...}'

It is put together as the BERT4Rec of "Turning Dross Into Gold Loss" (2023): one table has the vectors of padding, the
mask and the items, gives the input and is compared with the states. It draws random weights and writes them with the
states, scores, losses and gradients that they give. Items are numbered from 1 in the order of `item_ids`; 0 is the
mask.
"""

import json
import sys

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

USERS = 32  # the first ones
MASK, FIRST_ITEM = 1, 2  # rows of the table; 0 is padding


class BERT4Rec(nn.Module):
    """BertModel behind a table of items, which is compared with its states."""

    def __init__(self, task: dict, num_items: int):
        super().__init__()
        self.table = nn.Embedding(FIRST_ITEM + num_items, task["dim"])
        sizes = {"hidden_size": task["dim"], "intermediate_size": 4 * task["dim"]}
        depth = {"num_hidden_layers": task["blocks"], "num_attention_heads": task["heads"]}
        lengths = {"max_position_embeddings": task["maxlen"], "vocab_size": 1}
        self.bert = BertModel(BertConfig(**sizes, **depth, **lengths), add_pooling_layer=False)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the states (B, L, D) of right-padded rows (B, L)."""
        return self.bert(inputs_embeds=self.table(rows), attention_mask=(rows > 0).float()).last_hidden_state


def main() -> None:
    """Write the arrays and print their file as JSON."""
    task = json.loads(sys.argv[1])
    torch.manual_seed(task["seed"])
    arrays = {f"{name}/{key}": x for name, part in task["parts"].items() for key, x in outputs(task | part).items()}
    np.savez(task["out"], **arrays)
    print(json.dumps({"out": task["out"]}))


def outputs(task: dict) -> dict[str, np.ndarray]:
    """Return random weights, and what they give for masked histories and at the mask behind each history."""
    arrays = np.load(task["interactions"])
    item_ids, items = np.unique(arrays["item"], return_inverse=True)
    histories = split(arrays["user"], torch.from_numpy(items) + FIRST_ITEM)
    model = random_model(task, len(item_ids))
    kept = padded([history[-task["maxlen"] :] for history in histories])
    is_target = (torch.rand(kept.shape) < task["mask_share"]) & (kept > 0)
    shown = kept.masked_fill(is_target, MASK)
    states = model(shown)
    logits, targets = states[is_target] @ model.table.weight.T, kept[is_target]
    loss = F.cross_entropy(logits[:, FIRST_ITEM:], targets - FIRST_ITEM)
    loss.backward()
    asked = [torch.cat([history[1 - task["maxlen"] :], torch.tensor([MASK])]) for history in histories]
    ends = torch.tensor([len(row) - 1 for row in asked])
    newest = model(padded(asked))[torch.arange(len(asked)), ends]
    known = kept > 0
    found = parameters(model) | {
        "training/items": (shown - MASK)[known],
        "training/targets": torch.where(is_target, kept - MASK, 0)[known],
        "training/lengths": known.sum(1),
        "training/states": states[known],
        "loss": F.cross_entropy(logits, targets),
        "loss_without_extra_tokens": loss,
        "states": newest,
        "scores": newest @ model.table.weight[FIRST_ITEM:].T,
    }
    return {"item_ids": item_ids} | {name: x.detach().numpy() for name, x in found.items()}


def random_model(task: dict, num_items: int) -> BERT4Rec:
    """Return a model with its initial values, but with no bias at zero and no norm at one.

    The vector of token types, the same for all tokens, is zero: positions can contain it.
    """
    model = BERT4Rec(task, num_items)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        else:
            parameter.data.mul_(10)  # from N(0, 0.02), with which all attention is nearly uniform
    model.table.weight.data.normal_(0, 0.3)
    model.bert.embeddings.token_type_embeddings.weight.data.zero_()
    return model.eval()


def parameters(model: BERT4Rec) -> dict[str, Tensor]:
    """Return all parameters but those of words and token types, and their gradients."""
    kept = {
        name: x for name, x in model.named_parameters() if "word_embeddings" not in name and "token_type" not in name
    }
    gradients = {f"gradients/{name}": x.grad for name, x in kept.items()}
    return {f"weights/{name}": x for name, x in kept.items()} | gradients


def split(users: np.ndarray, items: Tensor) -> list[Tensor]:
    """Return the history of each of the first users."""
    ends = np.append(np.flatnonzero(np.diff(users)) + 1, len(users))[:USERS]
    return [items[start:end] for start, end in zip(np.append(0, ends), ends, strict=False)]


def padded(histories: list[Tensor]) -> Tensor:
    """Return the histories padded on the right (B, L)."""
    return nn.utils.rnn.pad_sequence(histories, batch_first=True)


if __name__ == "__main__":
    main()
