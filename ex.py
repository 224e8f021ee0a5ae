import lightning.pytorch as pl, time
from dact import DACT, TextClassifier
from dact.data import CompositionalSentiment
from dact.encoders import TransformerEncoder
t=time.time()
pl.seed_everything(0)
data = CompositionalSentiment(num_train=5000, num_val=200, num_test=200)  # generated reviews
encoder = TransformerEncoder(data.vocab_size, num_layers=4, hidden_size=32, num_heads=2)
model = DACT(encoder=encoder, output_dimension=3, learning_rate=5e-3, lambda_reg=0.01)
trainer = pl.Trainer(max_epochs=10, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(model, data)
trainer.validate(model, data)
classifier = TextClassifier(model, data.tokenizer)
print(classifier(["the screen is great .", "the screen is ironically great ."]))
print(time.time()-t)
