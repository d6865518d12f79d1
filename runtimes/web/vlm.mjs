// A bundle answers through transformers.js: the same lines in Node and in a browser.
//
// What transformers.js does otherwise than the model was trained is done here, from the bundle's own manifest: pictures
// are padded to a square where the model wants that, and a second begin-of-sequence token is dropped.

const TILED = ["idefics3", "smolvlm"];
const SUFFIXES = { fp32: "", fp16: "_fp16", int8: "_int8", q8: "_quantized", q4: "_q4" }; // of files, by transformers.js' words

/**
 * Load the bundle `name` with `library` (transformers.js, its `env` set up); `manifest` is its edgevlm.json.
 * `decoder` and `encoder` are precisions in transformers.js' words (q4, fp16, …) or the bundle's (int4-b128, …) where
 * not its default is meant, `device` another engine.
 */
export async function openBundle(library, name, manifest, { decoder, encoder, device } = {}) {
  if (manifest.fusion) throw new Error(`${manifest.name} fuses text with the picture, which transformers.js cannot do`);
  const config = await library.AutoConfig.from_pretrained(name);
  const dtype = { ...config["transformers.js_config"]?.dtype, ...wished(manifest, decoder, encoder) };
  const [processor, model] = await Promise.all([
    library.AutoProcessor.from_pretrained(name),
    library.AutoModelForImageTextToText.from_pretrained(name, { dtype, ...(device && { device }) }),
  ]);
  return { library, manifest, processor, model };
}

/** The words for what was wished; the embedding is the decoder's own where the bundle has one. */
function wished(manifest, decoder, encoder) {
  const found = {};
  if (encoder) found.vision_encoder = fileOf(manifest, "vision_encoder", encoder).word;
  if (decoder) {
    const { word, precision } = fileOf(manifest, "decoder_model_merged", decoder);
    const rows = filesOf(manifest, "embed_tokens");
    found.decoder_model_merged = word;
    found.embed_tokens = (rows.find((row) => row.precision === precision) ?? rows[0])?.word;
  }
  return found;
}

/** The file of `part` that `wish` names. For a word that it does not know transformers.js takes another file in silence. */
function fileOf(manifest, part, wish) {
  const files = filesOf(manifest, part);
  const found = files.find(({ word }) => word === wish) ?? files.find(({ precision }) => precision === wish);
  if (!found) throw new Error(`${manifest.name} has no ${part} in ${wish}: ask for ${files.map(({ word }) => word).join(", ")}`);
  return found;
}

/** The precision of every file of `part` that transformers.js can ask for, and its word for it. */
function filesOf({ parts }, part) {
  const words = Object.keys(SUFFIXES);
  const wordOf = (file) => words.find((word) => file === `onnx/${part}${SUFFIXES[word]}.onnx`);
  const files = parts.filter((one) => one.part === part && one.target === "onnx");
  return files.map(({ file, precision }) => ({ precision, word: wordOf(file) })).filter(({ word }) => word);
}

/**
 * The greedy answer to `question` about `image` (a RawImage): token ids without the one that ends it, and text.
 * `onText` gets each piece of text as it comes.
 */
export async function ask(vlm, image, question, { maxTokens = 128, onText = null } = {}) {
  const inputs = await prepare(vlm, image, question);
  const length = inputs.input_ids.dims[1];
  const room = vlm.manifest.max_context - length;
  if (room < 1) throw new Error(`the prompt has ${length} tokens, the context ${vlm.manifest.max_context}`);
  const output = await vlm.model.generate({
    ...inputs,
    do_sample: false,
    repetition_penalty: 1.0,
    max_new_tokens: Math.min(maxTokens, room),
    ...(onText && { streamer: streamer(vlm, onText) }),
  });
  const ids = output.slice(null, [length, null]).tolist()[0].map(Number);
  const stops = vlm.manifest.prompt.stop_token_ids;
  const answer = ids.filter((id, index) => index < ids.length - 1 || !stops.includes(id));
  const text = vlm.processor.tokenizer.decode(answer, { skip_special_tokens: true }).trim();
  return { ids: answer, text: answer.length ? text : "", numPromptTokens: length };
}

/** Everything that `generate` reads: the prompt's ids with a place for each vision row, and the pixels. */
export async function prepare({ library, manifest, processor, model }, image, question) {
  const content = [{ type: "image" }, { type: "text", text: question }];
  const prompt = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
  const picture = squared(library, image.rgb(), manifest.image);
  const inputs = TILED.includes(model.config.model_type)
    ? await processor(prompt, [picture])
    : await processor(picture, prompt, { add_special_tokens: false });
  return beginningOnce(inputs, prompt, processor.tokenizer);
}

/** The picture on a square of the padding's colour, in the middle, where the model was trained so. */
function squared(library, image, { fit, pad_color: color = [0, 0, 0] }) {
  const { width, height } = image;
  if (fit !== "pad" || width === height) return image;
  const side = Math.max(width, height);
  const [left, top] = [Math.floor((side - width) / 2), Math.floor((side - height) / 2)];
  const pixels = new Uint8ClampedArray(side * side * 3);
  for (let start = 0; start < pixels.length; start += 3) pixels.set(color, start);
  for (let row = 0; row < height; ++row) {
    const line = image.data.subarray(row * width * 3, (row + 1) * width * 3);
    pixels.set(line, ((row + top) * side + left) * 3);
  }
  return new library.RawImage(pixels, side, side, 3);
}

/** Templates write the first token, and some tokenizers write it again. */
function beginningOnce(inputs, prompt, tokenizer) {
  const { bos_token: bos, bos_token_id: id } = tokenizer;
  const [first, second] = inputs.input_ids.tolist()[0].map(Number);
  if (!bos || !prompt.startsWith(bos) || first !== id || second !== id) return inputs;
  const rest = (tensor) => tensor.slice(null, [1, null]);
  return { ...inputs, input_ids: rest(inputs.input_ids), attention_mask: rest(inputs.attention_mask) };
}

function streamer({ library, processor }, onText) {
  const options = { skip_prompt: true, skip_special_tokens: true, callback_function: onText };
  return new library.TextStreamer(processor.tokenizer, options);
}
