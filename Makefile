# Two commands do all the set-up on a fresh machine: `make demo` and `make test`. Another interpreter: PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo install gallery poc test test-slow lint cases lgg bench bench-speed bench-framework bench-lgg bench-phantom bench-nuclei bench-style bench-style-few bench-related bench-related-phantom bench-related-inverted bench-related-nuclei wheel clean

demo: $(STAMP)
	$(BIN)/pfedsam demo

# The command alone, as .venv/bin/pfedsam, for data of your own
install: $(STAMP)

# Server and two hospitals as real processes with mutual TLS on this machine
poc: $(STAMP)
	$(BIN)/pfedsam poc run

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=25

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow --durations=15

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

# Scripts that each make an input, run the installed command and judge the result: make cases CASES=<folder>
cases: $(STAMP)
	@test -n "$(CASES)" || { echo "say where the scripts are: make cases CASES=<folder>"; exit 2; }
	@failed=0; for case in "$(CASES)"/[0-9]*.py; do \
		PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -B "$$case" >.case.log 2>&1; code=$$?; \
		test $$code -eq 0 || failed=1; printf '%-32s %s %s\n' "$$(basename "$$case")" $$code "$$(grep -aE 'RIGHT|WRONG|Error' .case.log | tail -n 1 | cut -c 1-160)"; \
	done; rm -f .case.log; exit $$failed

# Real data: make lgg LGG=<folder with the four site folders>. It is only read: links to it are in LGG_DATA, with the split
# of the table in tests/benchmarks, which is even and written down (the default split goes by names and needs no file).
LGG_DATA := runs/lgg-data
lgg: $(STAMP)
	@test -n "$(LGG)" || { echo "say where the data is: make lgg LGG=<folder>"; exit 2; }
	$(BIN)/pfedsam split "$(LGG)" --out $(LGG_DATA)
	$(BIN)/pfedsam simulate $(LGG_DATA) --federation lgg --strategy annealed --rounds 18 --seed 0 --out runs/lgg --validate-every 6 \
		--set image_size=64 --set batch_size=4 --set augmentations=2 \
		--set positives_per_case=4 --set negatives_per_case=2 $(LGG_SETTINGS)

# Tables of tests/benchmarks. Runs that are in the records are not repeated; stopped, it goes on.
STRATEGIES := pfedsam_chosen,pfedsam,without_interpolation,one_adapter,fedavg_lora,fedavg_lora_ft,fedavg_lora_ft_interpolated,local_only,ensemble_local,centralised,feddpa,fedprox,fedrep,ditto,fedmsa,fedsam,all_of_sam_shared,narrow_lora,equal_rates
SEEDS ?= 0,1,2
bench-lgg: $(STAMP)
	@test -n "$(LGG)" || { echo "say where the data is: make bench-lgg LGG=<folder>"; exit 2; }
	$(BIN)/pfedsam split "$(LGG)" --out $(LGG_DATA)
	$(BIN)/pfedsam compare $(LGG_DATA) --out runs/bench-lgg --records tests/benchmarks/results/lgg.jsonl \
		--strategies $(STRATEGIES) --seeds $(SEEDS) --aggregation mean --rounds 8 --set image_size=128 --set adapted_blocks=8 --set amp=true --set batch_size=4 \
		--set augmentations=2 --set positives_per_case=2 --set negatives_per_case=1

# Shows the records that are kept with the code. Trained anew, into a file of its own:
# make bench-phantom PHANTOM_RECORDS=runs/bench-phantom/runs.jsonl
PHANTOM_RECORDS ?= tests/benchmarks/results/phantom.jsonl
PHANTOM_SEEDS ?= 0,1,2
runs/bench-phantom-data: $(STAMP)
	test -d $@ || $(BIN)/pfedsam phantom $@ --cases 9 --slices 12
bench-phantom: runs/bench-phantom-data
	$(BIN)/pfedsam compare runs/bench-phantom-data --out runs/bench-phantom \
		--records $(PHANTOM_RECORDS) --strategies local_only,longer_local,fedavg_lora,pfedsam,without_interpolation,pfedsam_chosen --seeds $(PHANTOM_SEEDS) \
		--aggregation mean --rounds 4 --set image_size=64 --set batch_size=2 --set augmentations=1 --set adapted_blocks=1 \
		--set positives_per_case=4 --set negatives_per_case=2 $(if $(filter tests/%,$(PHANTOM_RECORDS)),--table)

# The same where four training patients of each site have labels and the others are not there: FEW_SEEDS=0,1,2 for all folds
FEW_RECORDS ?= tests/benchmarks/results/nuclei-style-few.jsonl
FEW_SEEDS ?= 0
bench-style-few: runs/bench-style-data
	for fold in 0 1 2; do test -d runs/bench-style-few-$$fold || $(BIN)/python tests/benchmarks/fewer_labels.py runs/bench-style-data \
		runs/bench-style-few-$$fold --patients 4 --drop --fold $$fold; done
	PFEDSAM_BUNDLES=runs/bench-bundles $(BIN)/pfedsam compare 'runs/bench-style-few-{seed}' --out runs/bench-style-few --records $(FEW_RECORDS) \
		--bundle nuclei --strategies longer_local,fedavg_lora,pfedsam_chosen,longer_ft,pfedsam --seeds $(FEW_SEEDS) --aggregation mean \
		--rounds 12 --validate-every 6 --set image_size=96 --set adapted_blocks=2 --set batch_size=4 --set augmentations=2 \
		$(if $(filter tests/%,$(FEW_RECORDS)),--table)

# Related methods, each under the condition that it was made for, by what was kept with the code; trained anew, into files
# of their own: make bench-related RELATED=runs/related. NUCLEI is the folder of the six site folders.
comma := ,
RELATED ?= tests/benchmarks/results
RELATED_SEEDS ?= $(if $(filter tests/%,$(RELATED)),0,0$(comma)1$(comma)2)
PHANTOM_FEW = --aggregation mean --rounds 4 --set image_size=64 --set batch_size=2 --set adapted_blocks=1 \
	--set positives_per_case=4 --set negatives_per_case=2 $(if $(filter tests/%,$(RELATED)),--table)
NUCLEI_FEW = --bundle nuclei --aggregation mean --rounds 6 --validate-every 6 \
	--set image_size=96 --set adapted_blocks=2 --set batch_size=4 --set augmentations=2 $(if $(filter tests/%,$(RELATED)),--table)
bench-related: bench-related-phantom bench-related-nuclei
bench-related-phantom: runs/bench-phantom-data
	$(BIN)/pfedsam compare runs/bench-phantom-data --out runs/bench-weights --records $(RELATED)/related-weights.jsonl \
		--strategies fedavg_lora,weights_dro,weights_gaa --reference fedavg_lora --seeds 0,1,2 $(PHANTOM_FEW) --set augmentations=1
# One site whose contrast is inverted; no record of it is kept with the code yet
bench-related-inverted: runs/bench-phantom-data
	test -d runs/bench-inverted-data || $(BIN)/python tests/benchmarks/style.py runs/bench-phantom-data runs/bench-inverted-data --inverted site-3
	$(BIN)/pfedsam compare runs/bench-inverted-data --out runs/bench-inverted --strategies fedavg_lora,fedgin,style_adversary \
		--reference fedavg_lora --seeds 0,1,2 $(filter-out --table,$(PHANTOM_FEW)) --set augmentations=2
bench-related-nuclei: runs/bench-nuclei-data
	for fold in 0 1 2; do test -d runs/bench-few-$$fold || $(BIN)/python tests/benchmarks/fewer_labels.py runs/bench-nuclei-data \
		runs/bench-few-$$fold --patients 2 --fold $$fold; done
	PFEDSAM_BUNDLES=runs/bench-bundles $(BIN)/pfedsam compare 'runs/bench-few-{seed}' --out runs/bench-few --records $(RELATED)/related-few-labels.jsonl \
		--strategies fedavg_lora,twice_the_epochs,pseudo_labels_refined,warm_up --reference fedavg_lora --seeds $(RELATED_SEEDS) $(NUCLEI_FEW)

# Sites that differ: pictures of cell nuclei in six imaging settings, and the same where annotators follow guidelines of
# their own. NUCLEI is the folder of the six site folders. They show the records that are kept with the code; trained
# anew, into a file of its own: make bench-style NUCLEI=<folder> STYLE_RECORDS=runs/bench-style/runs.jsonl
NUCLEI_RECORDS ?= tests/benchmarks/results/nuclei.jsonl
STYLE_RECORDS ?= tests/benchmarks/results/nuclei-style.jsonl
DIFFERENT := local_only,fedavg_lora,fedavg_lora_ft,longer_ft,longer_ft_chosen,copy_and_experts,pfedsam,pfedsam_chosen
NUCLEI_COMPARE = PFEDSAM_BUNDLES=runs/bench-bundles $(BIN)/pfedsam compare --bundle nuclei --strategies $(DIFFERENT) --seeds $(SEEDS) \
	--reference longer_ft --aggregation mean --rounds 6 --validate-every 6 \
	--set image_size=96 --set adapted_blocks=2 --set batch_size=4 --set augmentations=2
runs/bench-nuclei-data: $(STAMP)
	@test -n "$(NUCLEI)" || { echo "say where the data is: NUCLEI=<folder with the six site folders>"; exit 2; }
	test -d $@ || $(BIN)/pfedsam split "$(NUCLEI)" --out $@
	test -d runs/bench-bundles/nuclei || $(BIN)/pfedsam new-bundle nuclei --classes nucleus --modality rgb --no-mirrored --out runs/bench-bundles
bench-nuclei: runs/bench-nuclei-data
	$(NUCLEI_COMPARE) runs/bench-nuclei-data --out runs/bench-nuclei --records $(NUCLEI_RECORDS) $(if $(filter tests/%,$(NUCLEI_RECORDS)),--table)
runs/bench-style-data: runs/bench-nuclei-data
	test -d $@ || $(BIN)/python tests/benchmarks/style.py runs/bench-nuclei-data $@ \
		--site fluo696=dilate:4 --site fluo256=erode:2 --site tissue_lilac=dilate:4
bench-style: runs/bench-style-data
	$(NUCLEI_COMPARE) runs/bench-style-data --out runs/bench-style --records $(STYLE_RECORDS) $(if $(filter tests/%,$(STYLE_RECORDS)),--table)

# Pictures of the page custom/gallery, from a demo run and the records of bench-phantom (apt install chromium nodejs npm)
gallery: $(STAMP)
	test -f runs/demo/results.json || $(BIN)/pfedsam demo
	mkdir -p runs/gallery
	COLUMNS=120 $(MAKE) -s bench-phantom > runs/gallery/table.txt || test -s runs/gallery/table.txt
	$(BIN)/python custom/gallery/pictures.py --run runs/demo --table runs/gallery/table.txt

# Steps, predictions and starts beside peers and an earlier commit, about 10 minutes with nothing else running
bench-speed: $(STAMP)
	$(BIN)/python tests/benchmarks/bench_speed.py

# Start, rounds, whole job and the server's memory of a tiny federation, about 5 minutes with nothing else running
bench-framework: $(STAMP)
	$(BIN)/python tests/benchmarks/bench_framework.py

bench: $(STAMP)
	$(BIN)/python tests/benchmarks/bench_cache.py
	$(BIN)/python tests/benchmarks/bench_payload.py
	$(BIN)/python tests/benchmarks/bench_memory.py
	$(BIN)/python tests/benchmarks/bench_infer.py
	$(BIN)/python tests/benchmarks/bench_validate.py --cases 300
	$(BIN)/python tests/benchmarks/bench_sites.py
	$(BIN)/python tests/benchmarks/bench_privacy.py
	$(BIN)/python tests/benchmarks/bench_encryption.py

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache
