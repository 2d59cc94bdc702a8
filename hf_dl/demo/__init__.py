"""Parts that the pages under spaces/ share. They need gradio, which the extra `demo` installs.

- `page`: theme, CSS, title, error messages, common components, and the command line of each page
- `welcome`: the notice on a page without a model; `recordings`: its recorded results
- `checkpoints`: find and keep models; `classifiers`: load image classifiers; `training`: train the default model
- `endpoints`: the API of the pages, also for MCP clients
- `uploads`: read images from visitors; `pictures`: draw the pictures on the pages
- `slots`, `decoders`, `slot_explorer`: the slot explorer without its layout
- `masking`: masking the patches of an image, without the layout of the page
- `phrases`, `gap`: masks and matches of phrases, and the plots of the modality gap, without the layout of the page
- `detectors`, `detector_views`: object detectors and their pictures, without the layout of the page
- `captioner`, `characters`, `gradients`, `recurrent_api`: captions with attention, the cells of a model of characters,
  gradients through time, and their endpoints, without the layout of the page
- `inside`, `inside_api`: all methods of `hf_dl.explain` for one image, and their endpoints
"""
