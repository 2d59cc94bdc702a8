"""Data as `datasets.Dataset` objects. Each source of data is a file with `load(split, source, ...)`.

- `scenes`: generated scenes of several objects, with masks, boxes, relations and captions
- `edited_scenes`: the same scenes, each with three rendered edits of its objects
- `editing_tasks`: edits for a model to make, with the rendered result
- `object_crops`: crops of the objects of generated scenes, labeled with color and shape
- `object_images`: generated labeled images of one object
- `labeled_images`: labeled images from any source: generated, folders, parquet, idx files, the Hub
- `masked_images`: images with instance masks from any source; `clevrtex` and `coco` read those two formats
- `detection`: images with boxes: generated scenes, PASCAL VOC, COCO, tables, the Hub
- `captions`: images with captions: generated scenes, COCO, Flickr, tables, the Hub
- `scene_captions`: several captions per generated scene, and the objects of a caption
- `phrasecut`: images with phrases and one mask per phrase: generated, PhraseCut, COCO, or the Hub
- `zero_shot`: images and prompts for zero-shot classification
- `text`: a generated language, text files, or the Hub, with tokenizers and batches
- `nested_text`: a generated language with quotes and nested brackets, for models of characters
- `math_programs`: word problems with programs: generated, MathQA files, or the Hub

The other files are parts of these: `image_arrays` and `collate` feed training loops, `raycast` renders scenes,
`counterfactual` edits scenes and renders them again, and `scene_annotations` writes captions.
`word_problems` writes problems, `superclasses` groups classes, `splits` finds and holds out splits,
`class_folders` and `mask_folders` list the images of folders. `decoded_images` decodes them.
`captioned_images` and `caption_files` read captions, and `binary_images` reads STL-10 and CIFAR.
`phrasecut_files`, `phrasecut_coco`, `phrasecut_rows` and `phrasecut_scenes` are the sources of `phrasecut`, and
`json_records` reads large files. `detection_files` reads the files of VOC and COCO, and `detection_augmentation` moves
boxes along with images.
"""
