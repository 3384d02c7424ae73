//! The standard service `grpc.reflection.v1.ServerReflection`, from the descriptors that `build.rs` wrote and those of the standard
//! services. Clients of version 1alpha, whose messages are the same on the wire, are answered too.

use futures_util::stream::{Stream, StreamExt};
use prost::{DecodeError, Message};
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet, ServiceDescriptorProto,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;
use tonic::{Code, Status, Streaming};
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{
    ErrorResponse, ExtensionNumberResponse, FileDescriptorResponse, ListServiceResponse, ServerReflectionRequest,
    ServerReflectionResponse, ServiceResponse,
};

/// The descriptors of all services.
const DESCRIPTORS: [&[u8]; 4] = [
    include_bytes!(concat!(env!("OUT_DIR"), "/kv.fds")),
    tonic_health::pb::FILE_DESCRIPTOR_SET,
    tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
    tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
];

/// Made when somebody first asks, and never changed.
static INDEX: LazyLock<Result<Index, DecodeError>> = LazyLock::new(|| Index::new(&DESCRIPTORS));

/// Answers a client's questions, one by one.
pub(super) fn answers(
    questions: Streaming<ServerReflectionRequest>,
) -> impl Stream<Item = Result<ServerReflectionResponse, Status>> + Send {
    questions.map(|question| {
        let unreadable = |error| Status::internal(format!("the descriptors cannot be read: {error}"));
        let index = INDEX.as_ref().map_err(unreadable)?;
        Ok(index.answer(question?))
    })
}

/// A file of definitions.
#[derive(Debug)]
struct File {
    encoded: Vec<u8>,
    imports: Vec<String>,
}

#[derive(Debug, Default)]
struct Index {
    files: BTreeMap<String, File>,
    /// The name of the file that defines a full name.
    symbols: BTreeMap<String, String>,
    types: BTreeSet<String>,
    services: BTreeSet<String>,
}

impl Index {
    fn new(sets: &[&[u8]]) -> Result<Self, DecodeError> {
        let mut index = Self::default();
        for set in sets {
            for file in FileDescriptorSet::decode(*set)?.file {
                index.add_file(&file);
            }
        }
        Ok(index)
    }

    fn add_file(&mut self, file: &FileDescriptorProto) {
        let (name, package) = (file.name(), file.package());
        let imports = file.dependency.clone();
        let encoded = file.encode_to_vec();
        self.files.insert(name.to_owned(), File { encoded, imports });
        file.message_type
            .iter()
            .for_each(|message| self.add_message(message, package, name));
        file.enum_type.iter().for_each(|one| self.add_enum(one, package, name));
        file.service
            .iter()
            .for_each(|service| self.add_service(service, package, name));
    }

    /// Notes where a name within a scope is defined, and returns the full name.
    fn add(&mut self, scope: &str, name: &str, file: &str) -> String {
        let full = if scope.is_empty() {
            name.to_owned()
        } else {
            format!("{scope}.{name}")
        };
        self.symbols.insert(full.clone(), file.to_owned());
        full
    }

    fn add_message(&mut self, message: &DescriptorProto, scope: &str, file: &str) {
        let full = self.add(scope, message.name(), file);
        self.types.insert(full.clone());
        for name in message.field.iter().map(|field| field.name()) {
            self.add(&full, name, file);
        }
        for name in message.oneof_decl.iter().map(|oneof| oneof.name()) {
            self.add(&full, name, file);
        }
        message
            .nested_type
            .iter()
            .for_each(|nested| self.add_message(nested, &full, file));
        message
            .enum_type
            .iter()
            .for_each(|nested| self.add_enum(nested, &full, file));
    }

    fn add_enum(&mut self, one: &EnumDescriptorProto, scope: &str, file: &str) {
        self.add(scope, one.name(), file);
        for value in &one.value {
            // The names of values stand beside that of their enum, not within it.
            self.add(scope, value.name(), file);
        }
    }

    fn add_service(&mut self, service: &ServiceDescriptorProto, scope: &str, file: &str) {
        let full = self.add(scope, service.name(), file);
        for method in &service.method {
            self.add(&full, method.name(), file);
        }
        self.services.insert(full);
    }

    fn answer(&self, question: ServerReflectionRequest) -> ServerReflectionResponse {
        let answer = match &question.message_request {
            Some(MessageRequest::FileByFilename(name)) => self.file(name),
            Some(MessageRequest::FileContainingSymbol(symbol)) => self.symbol(symbol),
            Some(MessageRequest::FileContainingExtension(extension)) => {
                let (number, of) = (extension.extension_number, &extension.containing_type);
                Err((Code::NotFound, format!("there is no extension {number} of {of}")))
            }
            Some(MessageRequest::AllExtensionNumbersOfType(name)) => self.extensions(name),
            Some(MessageRequest::ListServices(_)) => Ok(self.list()),
            None => Err((
                Code::InvalidArgument,
                "nothing is asked that this server knows".to_owned(),
            )),
        };
        let answer = answer.unwrap_or_else(|(code, error_message)| {
            MessageResponse::ErrorResponse(ErrorResponse {
                error_code: code as i32,
                error_message,
            })
        });
        ServerReflectionResponse {
            valid_host: question.host.clone(),
            original_request: Some(question),
            message_response: Some(answer),
        }
    }

    fn symbol(&self, symbol: &str) -> Result<MessageResponse, (Code, String)> {
        match self.symbols.get(symbol) {
            Some(file) => self.file(file),
            None => Err((Code::NotFound, format!("there is no symbol {symbol}"))),
        }
    }

    /// A file, and all that it imports.
    fn file(&self, name: &str) -> Result<MessageResponse, (Code, String)> {
        let mut names = vec![name];
        let mut file_descriptor_proto = vec![];
        let mut next = 0;
        while let Some(name) = names.get(next) {
            let file = self.files.get(*name);
            let file = file.ok_or_else(|| (Code::NotFound, format!("there is no file {name}")))?;
            file_descriptor_proto.push(file.encoded.clone());
            for import in &file.imports {
                if !names.contains(&import.as_str()) {
                    names.push(import);
                }
            }
            next += 1;
        }
        let response = FileDescriptorResponse { file_descriptor_proto };
        Ok(MessageResponse::FileDescriptorResponse(response))
    }

    /// No file here has extensions.
    fn extensions(&self, name: &str) -> Result<MessageResponse, (Code, String)> {
        if !self.types.contains(name) {
            return Err((Code::NotFound, format!("there is no type {name}")));
        }
        Ok(MessageResponse::AllExtensionNumbersResponse(ExtensionNumberResponse {
            base_type_name: name.to_owned(),
            extension_number: vec![],
        }))
    }

    fn list(&self) -> MessageResponse {
        let service = self.services.iter().map(|name| ServiceResponse { name: name.clone() });
        MessageResponse::ListServicesResponse(ListServiceResponse {
            service: service.collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

    use super::*;

    fn ask(question: Option<MessageRequest>) -> MessageResponse {
        let question = ServerReflectionRequest {
            host: "here".to_owned(),
            message_request: question,
        };
        let answer = INDEX.as_ref().unwrap().answer(question.clone());
        assert_eq!(answer.original_request, Some(question));
        answer.message_response.unwrap()
    }

    fn files(question: MessageRequest) -> Vec<String> {
        let MessageResponse::FileDescriptorResponse(found) = ask(Some(question)) else {
            panic!("no file");
        };
        let decode = |bytes: &Vec<u8>| FileDescriptorProto::decode(bytes.as_slice()).unwrap();
        found
            .file_descriptor_proto
            .iter()
            .map(|bytes| decode(bytes).name().to_owned())
            .collect()
    }

    fn error(question: Option<MessageRequest>) -> Code {
        let MessageResponse::ErrorResponse(error) = ask(question) else {
            panic!("no error");
        };
        Code::from(error.error_code)
    }

    #[test]
    fn services() {
        let MessageResponse::ListServicesResponse(list) = ask(Some(MessageRequest::ListServices(String::new()))) else {
            panic!("no list");
        };
        let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
        assert_eq!(
            names,
            [
                "grpc.health.v1.Health",
                "grpc.reflection.v1.ServerReflection",
                "grpc.reflection.v1alpha.ServerReflection",
                super::super::SERVICE,
            ]
        );
    }

    #[test]
    fn symbols_and_files() {
        for symbol in ["memkv.KV", "memkv.KV.Get", "memkv.GetRequest", "memkv.GetRequest.key"] {
            let question = MessageRequest::FileContainingSymbol(symbol.to_owned());
            assert_eq!(files(question), ["kv.proto", "memkv.proto"], "{symbol}");
        }
        for symbol in [
            "memkv.Entry",
            "memkv.Entry.expiry",
            "memkv.Code",
            "memkv.CODE_OK",
            "memkv.TopologyReport.TokenFunction",
            "memkv.TopologyReport.XXH3",
            "memkv.MetricsReport.CountersEntry",
        ] {
            let question = MessageRequest::FileContainingSymbol(symbol.to_owned());
            assert_eq!(files(question), ["memkv.proto"], "{symbol}");
        }
        assert_eq!(
            files(MessageRequest::FileByFilename("memkv.proto".to_owned())),
            ["memkv.proto"]
        );
    }

    #[test]
    fn what_there_is_not() {
        for symbol in ["", "memkv", "memkv.Nothing", ".memkv.KV", "KV", "memkv.Code.CODE_OK"] {
            let question = MessageRequest::FileContainingSymbol(symbol.to_owned());
            assert_eq!(error(Some(question)), Code::NotFound, "{symbol}");
        }
        assert_eq!(
            error(Some(MessageRequest::FileByFilename("other.proto".to_owned()))),
            Code::NotFound
        );
        assert_eq!(
            error(Some(MessageRequest::AllExtensionNumbersOfType("memkv.X".to_owned()))),
            Code::NotFound
        );
        assert_eq!(
            error(Some(MessageRequest::FileContainingExtension(Default::default()))),
            Code::NotFound
        );
        assert_eq!(error(None), Code::InvalidArgument);
        let extensions = ask(Some(MessageRequest::AllExtensionNumbersOfType(
            "memkv.Entry".to_owned(),
        )));
        assert!(
            matches!(extensions, MessageResponse::AllExtensionNumbersResponse(none) if none.extension_number.is_empty())
        );
    }
}
