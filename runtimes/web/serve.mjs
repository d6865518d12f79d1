// Show a bundle in a browser on this machine:  node serve.mjs BUNDLE [--port 8321]
//
// Threads of WebAssembly share memory, which browsers allow on pages that say so in two headers; any server that sends
// them can hold these files.  Nothing is read but this folder, the bundle and the two npm packages.

import { createReadStream, existsSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { dirname, extname, join, resolve, sep } from "node:path";
import { pipeline } from "node:stream";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import { fail, packageFolder } from "./packages.mjs";

const TYPES = {
  ".html": "text/html; charset=utf-8",
  ".mjs": "text/javascript",
  ".js": "text/javascript",
  ".wasm": "application/wasm",
  ".json": "application/json",
  ".png": "image/png",
  ".jpg": "image/jpeg",
};
const ISOLATED = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };
const PAGE_FILES = ["index.html", "page.mjs", "vlm.mjs"];

const USAGE = "node serve.mjs BUNDLE [--port 8321]";

function commandLine() {
  try {
    const { values, positionals } = parseArgs({
      options: { port: { type: "string", default: "8321" } },
      allowPositionals: true,
    });
    const isPort = /^\d{1,5}$/.test(values.port) && Number(values.port) < 65536; // 0: any free one
    if (positionals.length !== 1 || !isPort) fail(`usage: ${USAGE}`, 2);
    return { positionals, port: Number(values.port) };
  } catch (error) {
    return fail(`${error.message}; usage: ${USAGE}`, 2);
  }
}

const { positionals, port } = commandLine();
const bundle = resolve(positionals[0]);
if (!existsSync(join(bundle, "edgevlm.json"))) fail(`no bundle at ${bundle}: give the folder that \`edgevlm export\` wrote`, 2);

const FOLDERS = {
  bundle,
  transformers: join(packageFolder("@huggingface/transformers"), "dist"),
  onnxruntime: join(packageFolder("onnxruntime-web"), "dist"),
};

/** The file that a path of an address means; null for any outside the folders. */
function fileOf(path) {
  const [first, ...rest] = decodeURIComponent(path).slice(1).split("/");
  if (!rest.length) {
    const name = first || "index.html";
    return PAGE_FILES.includes(name) ? join(dirname(fileURLToPath(import.meta.url)), name) : null;
  }
  if (!Object.hasOwn(FOLDERS, first)) return null;
  const file = resolve(FOLDERS[first], ...rest);
  const inside = file.startsWith(FOLDERS[first] + sep);
  return inside && existsSync(file) && statSync(file).isFile() ? file : null;
}

function answer(request, response) {
  let file = null;
  try {
    file = fileOf(new URL(request.url, "http://localhost").pathname);
  } catch {
    // an address that cannot be read names no file
  }
  if (!file || !["GET", "HEAD"].includes(request.method)) {
    response.writeHead(404, ISOLATED).end();
    return;
  }
  const type = TYPES[extname(file)] ?? "application/octet-stream";
  response.writeHead(200, { ...ISOLATED, "Content-Type": type, "Content-Length": statSync(file).size });
  if (request.method === "HEAD") response.end();
  else pipeline(createReadStream(file), response, () => {}); // a file that cannot be read, or a page that left, ends both
}

const server = createServer(answer);
server.on("error", (error) => fail(error.message));
server.listen(port, "127.0.0.1", () => console.log(`http://127.0.0.1:${server.address().port}/`));
