// Where the npm packages are: beside this file, or in the folder that EDGEVLM_NODE_MODULES names.

import { existsSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const HERE = dirname(fileURLToPath(import.meta.url));

/** The folder of the installed package `name`; ends the program with one line where it is missing. */
export function packageFolder(name) {
  const folder = resolve(process.env.EDGEVLM_NODE_MODULES || join(HERE, "node_modules"), name);
  if (!existsSync(join(folder, "package.json"))) {
    // Without --ignore-scripts onnxruntime-node looks for GPU libraries to download; the CPU's come with it.
    fail(`${name} is not installed in ${dirname(folder)}: run \`npm install --ignore-scripts\` in ${HERE}`, 6);
  }
  return folder;
}

/** End with one line on stderr. */
export function fail(message, code = 1) {
  console.error(`error: ${message}`);
  process.exit(code);
}
