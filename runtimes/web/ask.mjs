// Ask a bundle about a picture in Node:  node ask.mjs BUNDLE IMAGE QUESTION [--max-tokens N] [--json]
// [--decoder q4] [--encoder int8]: other precisions of the bundle than its default, in transformers.js' words

import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { basename, dirname, join, resolve, sep } from "node:path";
import { parseArgs } from "node:util";

import { fail, packageFolder } from "./packages.mjs";
import { ask, openBundle } from "./vlm.mjs";

const USAGE = "node ask.mjs BUNDLE IMAGE QUESTION [--max-tokens N] [--decoder P] [--encoder P] [--json]";
const OPTIONS = {
  "max-tokens": { type: "string", default: "128" },
  decoder: { type: "string" },
  encoder: { type: "string" },
  json: { type: "boolean" },
};

function commandLine() {
  try {
    const { values, positionals } = parseArgs({ options: OPTIONS, allowPositionals: true });
    const maxTokens = Number(values["max-tokens"]);
    if (positionals.length !== 3 || !Number.isInteger(maxTokens) || maxTokens < 1) fail(`usage: ${USAGE}`, 2);
    return { ...values, maxTokens, places: positionals };
  } catch (error) {
    return fail(`${error.message}; usage: ${USAGE}`, 2);
  }
}

/** transformers.js, which reads the folder of the bundle and nothing else. */
function localLibrary(root) {
  const library = createRequire(join(packageFolder("@huggingface/transformers"), "package.json"))("./");
  library.env.allowRemoteModels = false;
  library.env.useFSCache = library.env.useBrowserCache = library.env.useWasmCache = false;
  library.env.localModelPath = dirname(root) + sep;
  library.env.logLevel = library.LogLevel.NONE;
  return library;
}

async function manifestOf(root) {
  try {
    return JSON.parse(await readFile(join(root, "edgevlm.json"), "utf-8"));
  } catch (error) {
    return fail(`${join(root, "edgevlm.json")}: ${error.message}; copy the bundle again`);
  }
}

async function main() {
  const { places, maxTokens, decoder, encoder, json } = commandLine();
  const [root, picture] = [resolve(places[0]), resolve(places[1])];
  if (!existsSync(join(root, "edgevlm.json"))) fail(`no bundle at ${root}: give the folder that \`edgevlm export\` wrote`, 2);
  if (!existsSync(picture)) fail(`no picture at ${picture}`, 2);
  const library = localLibrary(root);
  const manifest = await manifestOf(root);
  const vlm = await openBundle(library, basename(root), manifest, { decoder, encoder });
  const image = await library.RawImage.read(picture);
  const { ids, text, numPromptTokens } = await ask(vlm, image, places[2], { maxTokens });
  const found = { text, token_ids: ids, num_prompt_tokens: numPromptTokens };
  console.log(json ? JSON.stringify(found) : `${text}\nids: ${ids.join(" ")}`);
  await vlm.model.dispose();
}

main().catch((error) => fail(error.message));
