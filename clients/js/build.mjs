// `node build.mjs` makes dist/, which is what is published; `node build.mjs vendor` makes the copy that
// the pages of an instance use; `node build.mjs test` makes build/, the tests.
import { readFileSync } from "node:fs";
import { build } from "esbuild";

const common = { bundle: true, format: "esm", target: "es2022", logLevel: "warning" };
const { name, version, license } = JSON.parse(readFileSync("package.json", "utf8"));

// The hook's file imports the client's, instead of holding it once more.
const keepApart = {
  name: "keep-apart",
  setup: ({ onResolve }) =>
    onResolve({ filter: /^\.\/index\.js$/ }, ({ path }) => ({ path, external: true })),
};

const kind = process.argv[2];
if (kind === "test") {
  await build({ ...common, entryPoints: ["test/core.test.ts"], outdir: "build", platform: "node" });
} else if (kind === "vendor") {
  await build({
    ...common,
    entryPoints: ["src/index.ts"],
    outdir: process.argv[3] ?? "../../src/pokebridge/console/static/vendor/pokebridge-client",
    minify: true,
    banner: { js: `/*! ${name} ${version}, ${license}. Built from clients/js by \`npm run vendor\`. */` },
  });
} else {
  await build({
    ...common,
    entryPoints: ["src/index.ts", "src/react.ts"],
    outdir: "dist",
    minify: true,
    sourcemap: true,
    external: ["react"],
    plugins: [keepApart],
  });
}
