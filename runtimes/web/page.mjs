// The page: load the bundle once, then ask it.  `?picture=ADDRESS&question=TEXT&max_tokens=N&decoder=q4` asks at once.

import * as library from "/transformers/transformers.min.js";
import { ask, openBundle } from "./vlm.mjs";

const [form, file, picture, question, button, answer, engine] = ["form", "file", "picture", "question", "ask", "answer", "engine"].map(
  (id) => document.getElementById(id),
);
const wishes = new URLSearchParams(location.search);

library.env.allowRemoteModels = false;
library.env.allowLocalModels = true;
library.env.localModelPath = "/";
library.env.useBrowserCache = library.env.useWasmCache = false;
library.env.logLevel = library.LogLevel.ERROR;
library.env.backends.onnx.wasm.wasmPaths = "/onnxruntime/";

function show(state, text) {
  answer.dataset.state = state;
  answer.textContent = text;
}

async function load() {
  const response = await fetch("/bundle/edgevlm.json");
  if (!response.ok) throw new Error(`no bundle at ${response.url}: ${response.status}`);
  const manifest = await response.json();
  const names = { decoder: wishes.get("decoder"), encoder: wishes.get("encoder"), device: wishes.get("device") ?? "wasm" };
  const vlm = await openBundle(library, "bundle", manifest, names);
  engine.textContent = `${manifest.name}, onnxruntime-web ${names.device}, ${crossOriginIsolated ? "threads" : "one thread"}`;
  return vlm;
}

async function run(vlm, address) {
  button.disabled = true;
  show("thinking", "");
  try {
    const image = await library.RawImage.fromURL(address);
    const maxTokens = Number(wishes.get("max_tokens") ?? 128);
    if (!Number.isInteger(maxTokens) || maxTokens < 1) throw new Error("max_tokens must be a whole number of 1 or more");
    const options = { maxTokens, onText: (text) => answer.append(text) };
    const { ids, text } = await ask(vlm, image, question.value, options);
    answer.dataset.ids = ids.join(" ");
    show("done", text);
  } catch (error) {
    show("failed", error.message);
  }
  button.disabled = false;
}

file.addEventListener("change", () => {
  if (picture.src) URL.revokeObjectURL(picture.src);
  picture.hidden = !file.files.length; // who cancels the choice has none
  if (file.files.length) picture.src = URL.createObjectURL(file.files[0]);
  else picture.removeAttribute("src");
});

try {
  const vlm = await load();
  show("ready", "Choose a picture.");
  button.disabled = false;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (picture.src) run(vlm, picture.src);
    else show("ready", "Choose a picture first.");
  });
  if (wishes.get("question")) question.value = wishes.get("question");
  if (wishes.get("picture")) {
    picture.src = wishes.get("picture");
    picture.hidden = false;
    await run(vlm, new URL(wishes.get("picture"), location.href).href);
  }
} catch (error) {
  show("failed", error.message);
}
