"""What the course compares itself with, and what it predicts. scripts/render.py reads this file."""

# What the reference notes report for their L4: in words, the number, the lesson that measures it
# here, and what its Result line must say if the number holds.
CLAIMS = """\
y = 2x + 1 at x = 10 | 21.00 | basics/06_training | at_10 = 21.00
two clusters, training points | 100% | basics/08_classifier | train_accuracy = 100%
MNIST, fully connected network | 97.59% | basics/09_mnist | test_accuracy >= 97.59%
its parameters | 109,386 | basics/09_mnist | parameters = 109,386
MNIST, CNN | 98.79% | intermediate/02_cnn | test_accuracy >= 98.79%
its parameters | 52,138 | intermediate/02_cnn | parameters = 52,138
20 coin tosses, test | 58% | intermediate/03_overfitting_dropout | noise_test >= 57.5%
200 samples of a rule, test | 97.80% | intermediate/03_overfitting_dropout | rule_test >= 97.8%
digits 0 to 4, after transfer | 99.77% | advanced/01_transfer_learning | test_accuracy >= 99.77%
parameters trained | 650 | advanced/01_transfer_learning | trainable = 650
TorchScript, one image | 1.40x | advanced/02_model_optimization | torchscript >= 1.4
int8 file smaller by | 71% | advanced/02_model_optimization | int8_smaller >= 70.5%
GPU against CPU, batch of 512 | 86x | advanced/04_gpu_vs_cpu_benchmark | gpu_at_512 >= 86
parameters of a block of width 8 | 776 | llm/03_transformer_block | block = 776
parameters of GPT-2 small | 117 M | llm/03_transformer_block | gpt2_small <= 117,500,000
parameters of MiniGPT | 25,103 | llm/04_mini_gpt | parameters = 25,103
its loss | 0.16 to 0.28 | llm/04_mini_gpt | loss <= 0.285
LoRA in GPT-2, rank 8 (0.24%) | 294,912 | llm/07_finetune_lora | gpt2_trainable = 294,912
the same at rank 64 | 2.4 M | llm/11_lora_by_hand | gpt2_rank_64 >= 2,350,000
"""

# The lesson, what to change in it, and what its Result line must then say.
PREDICTIONS = [
    ("basics/05_first_nn", "NEURONS=16", "parameters = 81"),
    ("basics/06_training", "LEARNING_RATE=0.001", "at_10 >= 22"),
    ("basics/09_mnist", "LEARNING_RATE=0.1", "test_accuracy <= 90%"),
    ("intermediate/02_cnn", "EPOCHS=1", "test_accuracy >= 98%"),
    ("intermediate/03_overfitting_dropout", "DROPOUT=0.9", "dropout_train <= 98%"),
    ("intermediate/04_lr_scheduler", "LEARNING_RATE=0.01", "worst_gain <= 1"),
    ("advanced/01_transfer_learning", "CLASSES=10", "trainable = 650"),
    ("advanced/03_inference_pipeline", "SIDE=28", "scan_accuracy <= 80%"),
    ("advanced/06_memory_management", "PARTS=8", "accumulation_kept <= 13%"),
    ("advanced/09_profiling", "SMALL=64", "waits_before = 4"),
    ("llm/03_transformer_block", "DEPTH=2", "postnorm_loss <= 0.8"),
    ("llm/04_mini_gpt", "STEPS=100", "loss >= 0.3"),
    ("llm/07_finetune_lora", "EPOCHS=1", "word_for_word <= 60%"),
    ("llm/09_tokenizer", "TOY_MERGES=2", "lowest = 4"),
    ("llm/13_your_model_in_ollama", "ROPE_THETA_ON_TOP=False", "equal <= 12"),
]
