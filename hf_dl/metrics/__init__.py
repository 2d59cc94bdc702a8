"""Metrics as pure functions. Nine of them are also `evaluate` metrics that can be published as Spaces.

- `captions`: BLEU, ROUGE-L and CIDEr-D of captions; `caption_objects`: attributes and relations in captions
- `classification`: accuracy, F1, top-k accuracy
- `detection`: average precision of boxes, as COCO and VOC define it; `detection_errors`: kinds of errors
- `segmentation`: ARI, mean IoU, mean best overlap
- `images`: FID
- `editing`: edits of images with a known truth
- `modality_gap`: distance between embeddings of images and texts; `alignment`: maps that close it
- `phrase_segmentation`: masks for phrases, with the scores of PhraseCut and CLIPSeg
- `programs`: exact match and execution accuracy of programs; `program_baselines`: retrieval baselines
- `binding`, `latents`, `perceptual`: slots that follow objects, active latents, perceptual distance
- `<name>_metric`: the scores of one of these files as a class of the library `evaluate`
- `spaces`: the files of the metric Spaces

Import the file that you need. Importing `hf_dl.metrics` loads none of them.
"""
